"""From a planned graph to a program: which kernels and calls of PyTorch run in which order on which memory.

What a program is tells `sepc.runtime.program`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sepc.backends import generic
from sepc.backends.arguments import Argument, Result, Scratch
from sepc.backends.lowering import Lowering
from sepc.backends.stages.vector import Expr
from sepc.errors import VerificationError
from sepc.ir import ops, region
from sepc.ir.layout import layout, same_strides, storage_elements
from sepc.ir.problem import contiguous_strides
from sepc.passes.plan_memory import ALIGNMENT_BYTES, MemoryPlan
from sepc.runtime.executable import aligned_bytes
from sepc.runtime.host_graph import HostGraph, HostOp
from sepc.runtime.program import (
    ARENA,
    CONSTANTS,
    FIRST_INPUT,
    HostCall,
    KernelCall,
    Pointer,
    Program,
    Storage,
    TensorReference,
)
from sepc.runtime.records import Value


@dataclass(frozen=True)
class RegionCheck:
    """A region that TVM lowered, as something to be compared with its graph: see `sepc.backends.check`."""

    name: str
    graph: fx.GraphModule
    inputs: tuple[TensorReference, ...]
    result: TensorReference
    calls: tuple[KernelCall, ...]


@dataclass
class Assembled:
    """A program, and what it takes to build its library.

    Attributes:
        program: what the runtime executes.
        functions: PrimFuncs of the kernels, by symbol. parameters: their numbers of pointers.
        constants: the bytes of block 1.
        checks: the regions that TVM lowered.
        scratch: of each region that has scratch in the arena its offset and size in bytes, by the region's name.
    """

    program: Program = field(default_factory=Program)
    functions: dict[str, Expr] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    scratch: dict[str, tuple[int, int]] = field(default_factory=dict)
    constants: bytearray = field(default_factory=bytearray)
    checks: list[RegionCheck] = field(default_factory=list)


def assemble(
    graph_module: fx.GraphModule, lowering: Lowering, threads: int, on_host: Collection[str] = ()
) -> Assembled:
    """The program of a graph whose layouts, tilings and memory are planned, for calls with up to `threads` threads.

    The regions named in `on_host` are not offered to TVM.
    """
    return _Assembler(graph_module, lowering, threads, on_host).run()


class _Assembler:
    """One run of `assemble`."""

    def __init__(
        self, graph_module: fx.GraphModule, lowering: Lowering, threads: int, on_host: Collection[str]
    ) -> None:
        self.graph_module, self.lowering, self.threads, self.on_host = graph_module, lowering, threads, on_host
        self.plan: MemoryPlan = graph_module.meta["sepc_memory"]
        self.assembled = Assembled()
        self.program = self.assembled.program
        self.blocks: dict[fx.Node, tuple[int, int]] = {}  # owner → block, offset in bytes
        self.arena_bytes = self.plan.arena_bytes

    def run(self) -> Assembled:
        program, graph = self.program, self.graph_module.graph
        inputs = graph.find_nodes(op="placeholder")
        for index, node in enumerate(inputs):
            self.blocks[node] = (FIRST_INPUT + index, 0)
            program.inputs.append(_storage(node))
        for owner, offset in self.plan.arena_offsets.items():
            self.blocks[owner] = (ARENA, offset)
        for index, owner in enumerate(self.plan.results):
            self.blocks[owner] = (FIRST_INPUT + len(inputs) + index, 0)
            program.storages.append(_storage(owner))
        for node in graph.nodes:
            if node.op == "get_attr":
                self.blocks[node] = (CONSTANTS, self._constant(_bytes(ops.constant(self.graph_module, node))))
            elif region.is_region(node):
                self._region(node)
        program.results = list(map(self._reference, region.results(self.graph_module)))
        program.arena_bytes = self.arena_bytes
        program.constants_bytes = len(self.assembled.constants)
        return self.assembled

    def _region(self, node: fx.Node) -> None:
        graph, kind = region.submodule(self.graph_module, node), region.info(node)
        first = self.program.number_of_calls
        symbols: tuple[str, ...] = ()
        if kind.kernel == "sepc":
            for kernel in self.lowering.kernels(node, graph):
                threads = kernel.threads or self.threads
                arguments = [self._argument(node, argument, threads) for argument in kernel.arguments]
                self._kernel_call(kernel.name, kernel.function, arguments)
                symbols += (kernel.name,)
        else:
            on_host = node.name in self.on_host or _results_of(node)[1] is not None
            lowered = None if on_host else self.lowering.generic(graph, f"sepc_{node.name}")
            if not isinstance(lowered, generic.GenericRegion) or not _is_dense(node):
                self._host_call(node, graph)
            else:
                node.meta["sepc_region"] = replace(kind, kernel="tvm")
                symbols = self._generic_calls(node, lowered)
        self.program.calls[node.name] = (first, self.program.number_of_calls)
        self.program.symbols[node.name] = symbols

    # ---- calls

    def _kernel_call(self, symbol: str, function: Expr, arguments: Sequence[Pointer]) -> KernelCall:
        call = KernelCall(symbol, tuple(arguments), self.program.number_of_calls)
        last = self.program.steps[-1] if self.program.steps else None
        if isinstance(last, list):
            last.append(call)
        else:
            self.program.steps.append([call])
        self.assembled.functions[symbol] = function
        self.assembled.parameters[symbol] = len(arguments)
        self.program.number_of_calls += 1
        return call

    def _generic_calls(self, node: fx.Node, lowered: generic.GenericRegion) -> tuple[str, ...]:
        """Add the kernels of a region that TVM lowered; its temporaries live where nothing else does."""
        pointers: dict[str, Pointer] = {}
        for key, value in zip(lowered.inputs, region.inputs(node), strict=True):
            pointers[key] = self._pointer(value)
        (pointers[lowered.outputs[0]],) = map(self._pointer, _results_of(node)[0])
        for key, array in lowered.constants.items():
            pointers[key] = Pointer(CONSTANTS, self._constant(array))
        sizes = [_align(lowered.buffers[key].size_bytes) for key in lowered.temporaries]
        scratch = self._scratch(node, sum(sizes))
        for index, key in enumerate(lowered.temporaries):
            pointers[key] = Pointer(ARENA, scratch + sum(sizes[:index]))
        calls = []
        for kernel in lowered.kernels:
            arguments = [pointers[key] for key in (*kernel.inputs, *kernel.outputs)]
            calls.append(self._kernel_call(kernel.name, kernel.function, arguments))
        inputs = tuple(map(self._reference, region.inputs(node)))
        graph = region.submodule(self.graph_module, node)
        self.assembled.checks.append(RegionCheck(node.name, graph, inputs, self._reference(node), tuple(calls)))
        return tuple(kernel.name for kernel in lowered.kernels)

    def _host_call(self, node: fx.Node, graph: fx.GraphModule) -> None:
        inputs = tuple(map(self._reference, region.inputs(node)))
        owners, positions = _results_of(node)
        results = tuple(map(self._reference, owners))
        call = HostCall(_host_graph(graph), inputs, results, positions, self.program.number_of_calls)
        self.program.steps.append(call)
        self.program.number_of_calls += 1

    # ---- memory

    def _argument(self, node: fx.Node, argument: Argument, threads: int) -> Pointer:
        if isinstance(argument, Result):
            return self._pointer(region.owners(node)[argument.position])
        if isinstance(argument, Scratch):
            needed = argument.shared_bytes + argument.bytes_per_thread * threads
            return Pointer(ARENA, self._scratch(node, needed))
        if isinstance(argument, int):
            return self._pointer(region.inputs(node)[argument])
        return Pointer(CONSTANTS, self._constant(argument))

    def _scratch(self, node: fx.Node, size_bytes: int) -> int:
        """Where in the arena a region finds so many bytes that nobody else uses while it runs."""
        offset = _align(self.plan.in_use_bytes[node])
        self.arena_bytes = max(self.arena_bytes, offset + size_bytes)
        if size_bytes:
            _, known = self.assembled.scratch.get(node.name, (offset, 0))
            self.assembled.scratch[node.name] = offset, max(known, size_bytes)
        return offset

    def _pointer(self, node: fx.Node) -> Pointer:
        where = layout(node)
        block, offset = self.blocks[where.base]
        return Pointer(block, offset + where.offset * ops.dtype(node).itemsize)

    def _reference(self, node: fx.Node) -> TensorReference:
        pointer, dtype = self._pointer(node), ops.dtype(node)
        return TensorReference(
            pointer.block, pointer.offset_bytes // dtype.itemsize, ops.shape(node), layout(node).strides, dtype
        )

    def _constant(self, array: NDArray[Any]) -> int:
        """Append `array` to the constants; returns its offset in bytes."""
        constants = self.assembled.constants
        constants.extend(bytes(_align(len(constants)) - len(constants)))
        offset = len(constants)
        constants.extend(np.ascontiguousarray(array).tobytes())
        return offset


def constants_of(assembled: Assembled) -> torch.Tensor:
    """The program's constants, which `assembled` then has no more."""
    constants = aligned_bytes(assembled.program.constants_bytes)
    if assembled.constants:
        constants.copy_(torch.frombuffer(assembled.constants, dtype=torch.uint8))
        assembled.constants = bytearray()
    return constants


def _host_graph(graph: fx.GraphModule) -> HostGraph:
    """A region's graph in the form in which PyTorch runs it."""
    inputs = region.placeholders(graph)
    constants = [node for node in graph.graph.nodes if node.op == "get_attr"]
    values = {node: Value(index) for index, node in enumerate((*inputs, *constants, *region.computations(graph)))}

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        if isinstance(argument, list | tuple):  # Those of PyTorch's graphs are of a class of their own.
            return (list if isinstance(argument, list) else tuple)(map(plain, argument))
        return argument

    host_ops = []
    for node in region.computations(graph):
        if not callable(node.target):
            raise VerificationError("A region calls what is no function", where=node.name, why=str(node.target))
        kwargs = {name: plain(argument) for name, argument in node.kwargs.items()}
        host_ops.append(HostOp(node.target, tuple(map(plain, node.args)), kwargs))
    (result,) = graph.graph.output_node().args
    held = tuple(ops.constant(graph, node).detach() for node in constants)
    return HostGraph(len(inputs), held, tuple(host_ops), plain(result))


def _bytes(constant: torch.Tensor) -> NDArray[np.uint8]:
    """What `constant` holds, of whatever type: numpy knows fewer of those."""
    flat = constant.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def _storage(owner: fx.Node) -> Storage:
    return Storage(storage_elements(ops.shape(owner), layout(owner).strides), ops.dtype(owner))


def _is_dense(node: fx.Node) -> bool:
    """Whether a region's inputs and result are as TVM's kernels read and write them: dense, in logical order."""
    shaped = ((ops.shape(value), layout(value).strides) for value in (node, *region.inputs(node)))
    return all(same_strides(shape, strides, contiguous_strides(shape)) for shape, strides in shaped)


def _results_of(node: fx.Node) -> tuple[list[fx.Node], tuple[int, ...] | None]:
    """The nodes that own the results of a region: itself, or the getitems on it with their positions in its tuple."""
    if isinstance(node.meta["val"], torch.Tensor):
        return [node], None
    elements = region.elements(node)
    return [user for _, user in elements], tuple(position for position, _ in elements)


def _align(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
