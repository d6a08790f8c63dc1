"""What `sepc.compile` returns: a callable that compiles once per input shape and can be looked into."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sepc.errors import InputError, SepcError
from sepc.fallback import require_kernels
from sepc.runtime.model import Key, Model
from sepc.runtime.report import RegionReport
from sepc.runtime.signature import Signature
from sepc.runtime.specialization import Specialization
from sepc.target import Target

if TYPE_CHECKING:
    from sepc._compile import Compiled
    from sepc._remote import Remote
    from sepc.cost_model.chain import Objective
    from sepc.report.explanation import Explanation

# Compiled shapes that one model keeps before it refuses another one.
DEFAULT_SHAPE_LIMIT = 16

SourceForm = Literal["tirx", "llvm", "asm", "cuda", "opencl"]
FORMS: Final = {
    "llvm": ("tirx", "llvm", "asm"),
    "cuda": ("tirx", "cuda", "opencl"),
    "opencl": ("tirx", "cuda", "opencl"),
}
"""The forms that there are for each kind of target."""
ExportFormat = Literal["c", "tvm"]


class CompiledModel(Model):
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
        fullgraph: bool,
        verify_each: bool,
        runner: Remote | None = None,
        dump_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(target)
        self._model, self._num_threads, self._shape_limit = model, num_threads, shape_limit
        self._optimize, self._fullgraph, self._verify_each = optimize, fullgraph, verify_each
        self._runner, self._dump_dir = runner, dump_dir
        self._compiled: Compiled | None = None
        self._ranks: dict[Any, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    @property
    def threads(self) -> int:
        """How many threads of the host a call uses; one puts kernels on a GPU, whatever the number of the others."""
        return 1 if self.target.gpu is not None else self._num_threads or torch.get_num_threads()

    def precompile(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments without running; raises what `__call__` raises."""
        self._resolve(args, kwargs)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The optimised graph; PyTorch can run it. The passes run now if the kernels came from the cache."""
        return self._last().lowered.graph_module

    @property
    def compile_times(self) -> Mapping[str, float]:
        """Seconds that compiling took, by stage; little more than "capture" and "cache" where the cache had it."""
        return self._last().compile_times_s

    def source(self, region: RegionReport | str, form: SourceForm = "tirx") -> str:
        """The code of a region's kernels: "tirx", of a CPU's also "llvm" or "asm", of a GPU's also "cuda" or "opencl".

        Raises SepcError for a region without any.
        """
        name = region if isinstance(region, str) else region.name
        found = next((one for one in self.regions if one.name == name), None)
        if found is None or not found.symbols:
            names = ", ".join(one.name for one in self.regions if one.symbols)
            raise SepcError(f"There is no kernel for region '{name}'", fix=f"choose one of {names}")
        if form not in (forms := FORMS[self.target.kind]):
            why = f"for the target '{self.target.name}' there are {', '.join(forms)}"
            raise SepcError(f"There is no source form '{form}'", why=why, fix=f"choose {', '.join(forms)}")
        lowered = self._last().lowered
        return "\n".join(lowered.source(symbol, form, self.target) for symbol in found.symbols)

    def export(self, path: str | os.PathLike[str], format: ExportFormat = "c", *, name: str = "model") -> list[Path]:  # noqa: A002 -- as exports call it
        """Write what was compiled last so that it runs elsewhere, without Python's packages that compiled it.

        Args:
            path: a directory, made if need be.
            format: "c" for sources, an object file with the kernels, and the weights, which need a C compiler for the
                target and nothing else (for "cuda", CUDA C and machine code for each architecture, behind an interface
                in C over CUDA's driver); "tvm" for a shared library with the weights in it, for TVM's runtime and for
                `sepc.load`, which runs it from NumPy.
            name: of the C function, which is ``<name>_run``, and of its files.

        Returns the files. Raises SepcError if nothing is compiled yet, InputError for a bad name or format, ModelError
        if PyTorch would run a part of it, and for "tvm" BuildError or TargetError if there is no compiler to link it;
        TargetError for what there is not for a GPU.
        """
        from sepc.bundle.bundle import Bundle, require_writable
        from sepc.bundle.cuda import CudaBundle
        from sepc.bundle.library import library_files
        from sepc.runtime import exported

        if format not in get_args(ExportFormat):
            raise InputError(f"There is no format {format!r}", where="export", fix='use format="c" or format="tvm"')
        compiled = self._last()
        require_writable(name, compiled)
        if self.target.gpu is not None:
            return CudaBundle.of(name, self.target, compiled, format).write(Path(path))
        bundle = Bundle.of(name, self.target, compiled, compiled.lowered.objects(self.target, name))
        if format == "c":
            return bundle.write(Path(path))
        library = compiled.lowered.library(replace(bundle, shared=True), self.target)
        return exported.write(Path(path), self.target, *library_files(bundle, compiled, library))

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """What becomes of the model for these arguments, and why; without any, what became of what was compiled last.

        Nothing is run, so that any target will do; what has no kernel is told, where a call might refuse it.
        """
        from sepc.report.explanation import Explanation

        compiled = self._compiled_for(args, kwargs) if args or kwargs else self._last()
        return Explanation.of(type(self._model).__name__, compiled, self.target)

    def _compiled_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
        """What is compiled for these arguments; compiled now, and not kept, if they are new."""
        from sepc._compile import Compiled

        key, leaves, spec = self._key(args, kwargs)
        known = self._known(key)
        return known if isinstance(known, Compiled) else self._specialize(leaves, spec)

    def _require_runnable(self, *, timed: bool = False) -> None:
        if self._runner is None:  # Else it is for the device to say.
            super()._require_runnable(timed=timed)

    def _last(self) -> Compiled:
        self._current()  # Says so if there is none.
        assert self._compiled is not None
        return self._compiled

    def _missing(self, key: Key, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Specialization:
        """Compile for a new signature, once even if several threads ask."""
        with self._lock:
            if key in self._specializations:
                return self._specializations[key]
            self._check(key, leaves, spec)
            compiled = self._specialize(leaves, spec)
            # Afterwards, and so in the same way for what comes from the cache, which is of compilations of both kinds.
            runs_here = self._runner is None and self.target.is_runnable
            require_kernels(compiled, self.target, self._fullgraph, runs_here)
            self._compiled = self._latest = self._specializations[key] = compiled
            self._ranks.setdefault(spec, _ranks(leaves))
            return compiled

    def _specialize(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Compiled:
        """The model compiled for these arguments, whatever is left to PyTorch."""
        from sepc._compile import specialize

        # Copies, since torch.export takes arguments that are one tensor at this call to be one at every call; of the
        # CPU, as the model is.
        distinct = [_copied(leaf, self.target.device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(distinct, spec)
        signature = Signature.of(spec, leaves)
        options = self._optimize, self._verify_each, self._runner, self._dump_dir
        return specialize(self._model, self.target, self.threads, args, kwargs, signature, *options)

    def _check(self, key: Key, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
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


def _copied(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A copy of a tensor, on the CPU if it is on the kind of device that runs the model."""
    return tensor.cpu() if tensor.device.type == device != "cpu" else tensor.clone()


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _ranks(leaves: Sequence[Any]) -> tuple[int, ...]:
    return tuple(tensor.dim() for tensor in _tensors(leaves))
