"""Regions without a kernel of ours: element-wise oddities, data movement, reductions, softmax, resampling.

The ATen graph of a region becomes a TVM tensor program (`generic_ops`: one expression per operator), which is split
into loop nests and scheduled generically (`generic_schedule`). The result is a sequence of raw C-ABI kernels with
sepc's calling convention, ``int32 name(ptr in…, ptr out…, int32 thread, int32 threads)``, and a barrier is needed after
each. Buffers are dense and row-major in the logical order of dimensions; pointers need be aligned to their elements
only. Objects may need ``-lm``.

Only operators of an explicit allowlist are lowered; everything else is a `Rejection`, and such regions run in PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from tvm import te

from sepc.backends import generic_schedule
from sepc.backends.generic_ops import CONVERSIONS, CONVERTERS, DTYPES, HALVES, Emitter, UnsupportedError

# Indices are 32-bit.
_MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class Rejection:
    """Why a region cannot be lowered."""

    reason: str


@dataclass(frozen=True)
class BufferSpec:
    """A dense row-major array: shape in logical order, dtype by TVM's (and numpy's) name; bool takes one byte."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Size of the array in bytes."""
        return prod(self.shape) * int(np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class GenericKernel:
    """One raw kernel.

    Attributes:
        name: its C symbol.
        function: the raw `tvm.tirx.PrimFunc`, for ``tvm.compile(function, target, tir_pipeline="tirx")``.
        inputs, outputs: buffer ids in the order of the C arguments, which are inputs, outputs, thread, threads.
        tasks: how many tasks threads share; of one, thread 0 does it and the others return at once.
    """

    name: str
    function: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tasks: int


@dataclass(frozen=True)
class GenericRegion:
    """A region as a sequence of kernels, to be called in order with a barrier after each.

    Attributes:
        kernels: the kernels.
        buffers: every buffer by id: ``in<i>`` (placeholder i), ``const<i>``, ``temp<i>`` (between kernels), ``out<i>``.
        inputs: one id per placeholder, in order, whether a kernel reads it or not.
        outputs: ids of the results.
        constants: contents of the constant buffers.
    """

    kernels: tuple[GenericKernel, ...]
    buffers: Mapping[str, BufferSpec]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, np.ndarray]

    @property
    def temporaries(self) -> tuple[str, ...]:
        """Ids of the buffers that live between kernels."""
        return tuple(key for key in self.buffers if key.startswith("temp"))


def overload_name(node: fx.Node) -> str:
    """``op.overload`` of an ATen call; empty for other nodes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return f"{target._schema.name.removeprefix('aten::')}.{target._overloadname}"
    return ""


def is_allowed(node: fx.Node) -> bool:
    """Whether `node` may be part of a region for `lower`; its arguments may still lead to a rejection there."""
    return _is_getitem(node) or overload_name(node) in CONVERTERS


def lower(submodule: fx.GraphModule, name: str, vector_lanes: int) -> GenericRegion | Rejection:
    """Lower a region of ATen operators with static shapes to raw kernels.

    Args:
        submodule: placeholders with ``meta["val"]``, ``get_attr`` constants, calls of ATen operators, tensor outputs.
        name: prefix of the kernels' C symbols.
        vector_lanes: float32 elements per vector register, a power of two.
    """
    try:
        return _Lowering(submodule, name, vector_lanes).run()
    except UnsupportedError as error:
        return Rejection(str(error))


def _is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


class _Lowering:
    """One run of `lower`: fx nodes → tensor expressions → kernels."""

    def __init__(self, submodule: fx.GraphModule, name: str, vector_lanes: int) -> None:
        self.submodule, self.name, self.lanes = submodule, name, vector_lanes
        self.emitter = Emitter()
        self.values: dict[fx.Node, Any] = {}
        self.types: dict[fx.Node, Any] = {}
        self.inputs: list[Any] = []
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self) -> GenericRegion:
        outputs: list[Any] = []
        for node in self.submodule.graph.nodes:
            if node.op == "output":
                found = node.args[0]
                outputs = [self._result(value) for value in (found if isinstance(found, list | tuple) else [found])]
            else:
                self.values[node] = self._value(node)
        return self._kernels(outputs)

    # ---- nodes to tensor expressions

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            self.types[node] = _checked(node.meta["val"], node)
            self.inputs.append(_placeholder(self.types[node], f"input_{len(self.inputs)}"))
            return self.inputs[-1]
        if node.op == "get_attr":
            tensor = getattr(self.submodule, str(node.target)).detach()
            self.types[node] = _checked(tensor, node)
            self._refuse_halves(node)
            return self.emitter.constant(tensor.cpu().contiguous().numpy())
        if _is_getitem(node):
            source, position = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(position, int)
            self.types[node] = self.types[source][position]
            return self.values[source][position]
        converter = CONVERTERS.get(overload_name(node))
        if converter is None:
            raise UnsupportedError(
                f"{node.name}: {node.target} is not on the list of operators for the generic lowering"
            )
        self.types[node] = self.emitter.out = _checked(self._type(node), node)
        if overload_name(node) not in CONVERSIONS:
            self._refuse_halves(node)
        try:
            return converter(self.emitter, *self._arguments(node))
        except UnsupportedError as error:
            raise UnsupportedError(f"{node.name}: {error}") from error

    def _refuse_halves(self, node: fx.Node) -> None:
        for value in pytree.tree_leaves([self.types[one] for one in (node, *node.all_input_nodes)]):
            if value.dtype in HALVES:
                raise UnsupportedError(f"{node.name}: {value.dtype} is only converted")

    def _type(self, node: fx.Node) -> Any:
        if "val" in node.meta:
            return node.meta["val"]
        with self.mode:  # regions made by hand or by a pass that forgot
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda arg: torch.empty_like(self.types[arg], device="cpu")
            )
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _arguments(self, node: fx.Node) -> list[Any]:
        """The arguments in the order of the operator's schema, defaults filled in, tensors as expressions."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
        ordered = [given.get(argument.name, argument.default_value) for argument in schema]
        return [fx.map_arg(argument, lambda arg: self.values[arg]) for argument in ordered]

    def _result(self, node: Any) -> Any:
        """The region's result `node` as a tensor of its own: never an input, a constant, or a result given before."""
        value = self.values[node]
        copy = lambda *i: value(*i)  # noqa: E731, PLW0108 -- te.compute looks at the signature
        return te.compute(value.shape, copy, name=f"result_{self.emitter.unique()}")

    # ---- tensor expressions to kernels

    def _kernels(self, outputs: list[Any]) -> GenericRegion:
        constants = self.emitter.constants
        program = te.create_prim_func([*self.inputs, *constants, *outputs])
        ids = [f"in{i}" for i in range(len(self.inputs))] + [f"const{i}" for i in range(len(constants))]
        ids += [f"out{i}" for i in range(len(outputs))]
        program = generic_schedule.inline(program, self.emitter.may_inline, lambda block: block in self.emitter.heavy)
        named = list(zip(program.params, ids, strict=True))
        kernels = [
            self._kernel(nest, position, named) for position, nest in enumerate(generic_schedule.split_nests(program))
        ]
        return GenericRegion(
            kernels=tuple(kernels),
            buffers={key: BufferSpec(tuple(int(n) for n in buffer.shape), str(buffer.dtype)) for buffer, key in named},
            inputs=tuple(ids[: len(self.inputs)]),
            outputs=tuple(ids[-len(outputs) :]),
            constants={f"const{i}": array for i, array in enumerate(constants.values())},
        )

    def _kernel(self, nest: generic_schedule.Nest, position: int, named: list[tuple[Any, str]]) -> GenericKernel:
        def identify(buffer: Any) -> str:
            for known, key in named:
                if known.same_as(buffer):
                    return key
            named.append((buffer, f"temp{sum(key.startswith('temp') for _, key in named)}"))
            return named[-1][1]

        inputs, outputs = tuple(map(identify, nest.reads)), tuple(map(identify, nest.writes))
        symbol = f"{self.name}_{position}"
        function, tasks = generic_schedule.raw_kernel(generic_schedule.scheduled(nest.function, self.lanes), symbol)
        return GenericKernel(symbol, function, inputs, outputs, tasks)


def _checked(value: Any, node: fx.Node) -> Any:
    """`value` (a tensor or tuple of tensors), after making sure that kernels can hold it."""
    for tensor in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedError(f"{node.name}: not a tensor")
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(f"{node.name}: dtype {tensor.dtype} is not handled")
        if not all(isinstance(extent, int) for extent in tensor.shape):
            raise UnsupportedError(f"{node.name}: the shape is not static")
        if not 0 < tensor.numel() <= _MAX_ELEMENTS:
            raise UnsupportedError(f"{node.name}: {tensor.numel()} elements")
    return value


def _placeholder(value: torch.Tensor, name: str) -> Any:
    return te.placeholder(tuple(value.shape), DTYPES[value.dtype], name=name)
