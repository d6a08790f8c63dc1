"""What is known of a compiled model beyond what it takes to run it: the graph, and kernels in other forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sepc.errors import BuildError

if TYPE_CHECKING:
    from torch import fx

    from sepc.bundle.bundle import Bundle
    from sepc.passes.manager import PassRecord
    from sepc.target import Target


@dataclass(frozen=True)
class Lowered:
    """What the compiler knows of a specialisation beyond what it takes to run it.

    Attributes:
        graph_module: the optimised graph. passes: what each pass did.
        functions: PrimFuncs of the kernels, by symbol.
        scratch: of each region that has scratch in the arena its offset and size in bytes, by the region's name.
    """

    graph_module: fx.GraphModule
    passes: Sequence[PassRecord]
    functions: Mapping[str, Any]
    scratch: Mapping[str, tuple[int, int]]

    def source(self, symbol: str, form: str, target: Target) -> str:
        """The code of a kernel in a form that there is for `target`: see `CompiledModel.source`."""
        return str(load_backend().source_of(self.functions[symbol], form, target))

    def cuda_source(self) -> str:
        """All kernels of a GPU as one file of CUDA C."""
        return str(load_backend().gpu_source_of(self.functions, "cuda"))

    def cubin(self, source: str, architecture: str) -> bytes:
        """Machine code of `source` for an architecture of NVIDIA's."""
        return bytes(load_backend().compile_cuda(source, architecture).code)

    def objects(self, target: Target, prefix: str) -> bytes:
        """All kernels as one object file, with `prefix` and an underscore in front of their symbols."""
        return bytes(load_backend().compile_module(self.functions, target, prefix))

    def library(self, bundle: Bundle, target: Target) -> bytes:
        """A shared library of a bundle with these kernels."""
        return bytes(load_backend().shared_library(bundle, target))


class Backend:
    """The backend's entry points."""

    def __init__(self) -> None:
        from sepc.backends.build import build, compile_module, lowering_for, source_of
        from sepc.backends.check import wrong_regions
        from sepc.backends.gpu.nvcc import compile_source
        from sepc.backends.gpu.source import source_of as gpu_source_of
        from sepc.backends.library import shared_library
        from sepc.backends.program import assemble

        self.lowering, self.assemble, self.build, self.wrong_regions = lowering_for, assemble, build, wrong_regions
        self.source_of, self.compile_module, self.shared_library = source_of, compile_module, shared_library
        self.gpu_source_of, self.compile_cuda = gpu_source_of, compile_source


def load_backend() -> Backend:
    """The backend, imported late: TVM takes two seconds to load."""
    try:
        return Backend()
    except ImportError as error:
        raise BuildError(
            "TVM cannot be imported",
            why=str(error),
            fix="pip install 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi==0.1.14.post1'",
        ) from error
