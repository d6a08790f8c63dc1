"""What `sepc.compile` returns: a callable that compiles once per input shape and can be looked into."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sepc.errors import InputError, SepcError
from sepc.target import Target

if TYPE_CHECKING:
    from sepc._compile import Specialization
    from sepc.cost_model.chain import Objective

# Compiled shapes that one model keeps before it refuses another one.
DEFAULT_SHAPE_LIMIT = 16

SourceForm = Literal["tirx", "llvm", "asm"]


@dataclass(frozen=True)
class RegionReport:
    """One region of a compiled model: a kernel, or a part that PyTorch runs.

    Attributes:
        name: the region's name. kind: what it hangs on. ops: the ATen operators inside, in order.
        kernel: who runs it: "sepc", "tvm" or "torch". reason: why it is not a kernel of ours.
        tiling: the chosen blocking; empty where there is none.
        predicted_us: the cost model's time, in microseconds (0 for regions without a kernel of ours).
        bytes_moved: compulsory traffic in bytes: inputs, weights, result. flops: floating-point operations.
        symbols: names of its functions in the library.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    kernel: str
    reason: str
    tiling: str
    predicted_us: float
    bytes_moved: int
    flops: int
    symbols: tuple[str, ...]


class CompiledModel:
    """A model compiled by sepc. Call it as you would the model; see `sepc.compile`.

    It compiles once per input shape and number of threads. Calls may come from several Python threads. Results never
    require gradients. Attributes describe what was compiled last.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        target: Target,
        num_threads: int | None,
        optimize: Objective,
        shape_limit: int,
        verify_each: bool,
    ) -> None:
        self.target = target
        self._model, self._num_threads, self._shape_limit = model, num_threads, shape_limit
        self._optimize, self._verify_each = optimize, verify_each
        self._runnable = False  # Not known yet.
        self._specializations: dict[Any, Specialization] = {}
        self._latest: Specialization | None = None
        self._ranks: dict[Any, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for these arguments.

        Raises InputError for arguments that do not fit, TargetError where this host cannot run the target, and what
        `sepc.compile` raises when the shapes are new.
        """
        if not self._runnable:
            self.target.require_runnable()
            self._runnable = True
        specialization, tensors = self._resolve(args, kwargs)
        return specialization.run(tensors, self.threads)

    @property
    def threads(self) -> int:
        """How many threads a call uses."""
        return self._num_threads or torch.get_num_threads()

    def precompile(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments without running; raises what `__call__` raises."""
        self._resolve(args, kwargs)

    @property
    def regions(self) -> list[RegionReport]:
        """The regions, in execution order."""
        return self._compiled().regions

    @property
    def graph_module(self) -> fx.GraphModule:
        """The optimised graph; PyTorch can run it."""
        return self._compiled().graph_module

    @property
    def compile_times(self) -> Mapping[str, float]:
        """Seconds that compiling took, by stage."""
        return self._compiled().compile_times_s

    @property
    def arena_bytes(self) -> int:
        """Memory for intermediate values and the kernels' scratch, in bytes: the peak of a call beside its results."""
        return self._compiled().executable.program.arena_bytes

    def source(self, region: RegionReport | str, form: SourceForm = "tirx") -> str:
        """The code of a region's kernels as "tirx", "llvm" or "asm"; raises SepcError for a region without any."""
        name = region if isinstance(region, str) else region.name
        found = next((one for one in self.regions if one.name == name), None)
        if found is None or not found.symbols:
            names = ", ".join(one.name for one in self.regions if one.symbols)
            raise SepcError(f"There is no kernel for region '{name}'", fix=f"choose one of {names}")
        if form not in ("tirx", "llvm", "asm"):
            raise SepcError(f"There is no source form '{form}'", fix="choose tirx, llvm or asm")
        executable = self._compiled().executable
        return "\n".join(executable.source(symbol, form) for symbol in found.symbols)

    def profile(self, *args: Any, repeats: int = 50, **kwargs: Any) -> list[tuple[str, float]]:
        """Measured time of each region for these arguments: (name, median in microseconds), in execution order."""
        specialization, tensors = self._resolve(args, kwargs)
        specialization.run(tensors, self.threads)
        return list(specialization.executable.profile(tensors, self.threads, repeats).items())

    def _compiled(self) -> Specialization:
        if self._latest is None:
            raise SepcError(
                "Nothing is compiled yet",
                why="compilation happens at the first call, when the input shapes are known",
                fix="call the model once, or pass example_inputs to sepc.compile",
            )
        return self._latest

    def _resolve(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Specialization, list[torch.Tensor]]:
        """The specialisation for these arguments, compiled if it is new, and their tensors as it takes them."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = [_dense(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        shapes = (spec, *map(_signature, leaves))
        # Work is divided when the kernels are generated, so the number of threads is part of the key.
        key = (self.threads, shapes)
        try:
            known = self._specializations.get(key)
        except TypeError as error:
            raise InputError(
                "An argument is neither a tensor nor a plain value", why=str(error), fix="pass tensors and numbers only"
            ) from error
        return known or self._specialize(key, leaves, spec), _tensors(leaves)

    def _specialize(self, key: Any, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Specialization:
        """Compile for a new signature, once even if several threads ask."""
        from sepc._compile import specialize

        with self._lock:
            if key in self._specializations:
                return self._specializations[key]
            self._check(key, leaves, spec)
            # Copies, since torch.export takes arguments that are one tensor at this call to be one at every call.
            distinct = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(distinct, spec)
            self._latest = specialize(
                self._model, self.target, self.threads, args, kwargs, self._optimize, self._verify_each
            )
            self._specializations[key] = self._latest
            self._ranks.setdefault(spec, _ranks(leaves))
            return self._latest

    def _check(self, key: Any, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        """Raise InputError for what must not be compiled: another rank, or too many shapes."""
        known, given = self._ranks.get(spec), _ranks(leaves)
        for index, (expected, actual) in enumerate(zip(known or (), given, strict=False)):
            if expected != actual:
                raise InputError(
                    f"Tensor input {index} has {actual} dimensions, the compiled one has {expected}",
                    where=f"an input of shape {tuple(_tensors(leaves)[index].shape)}",
                    why="a change of rank is a change of model, not of size",
                    fix="add or remove the batch dimension, or compile the model anew for this rank",
                )
        if len({shapes for _, shapes in self._specializations} | {key[1]}) > self._shape_limit:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(leaves))
            raise InputError(
                f"This model is already compiled for {self._shape_limit} input shapes, the limit",
                where=f"an input of shape {shapes}",
                why="each new shape compiles a library of its own",
                fix="pad inputs to few sizes, or raise shape_limit in sepc.compile",
            )


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _ranks(leaves: Sequence[Any]) -> tuple[int, ...]:
    return tuple(tensor.dim() for tensor in _tensors(leaves))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, without its gradient, if it is contiguous or channels-last, else a contiguous copy."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


def _signature(leaf: Any) -> Any:
    """What a specialisation depends on: a tensor's type and strides, any other value and its type (1 is not 1.0)."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device.type, leaf.is_contiguous()
    return type(leaf), leaf
