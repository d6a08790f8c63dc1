"""A compiled model for NVIDIA's GPUs: CUDA C, machine code per architecture, and C that calls it.

As in the bundle for CPUs, one function runs the model; here it puts the kernels on a stream. It needs CUDA's driver and
nothing else, neither nvcc nor CUDA's runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sepc.bundle.bundle import Bundle, render, write_files
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpus import CUDA_ARCHITECTURES, EMBEDDED, capability
from sepc.errors import TargetError
from sepc.runtime.cuda import CudaExecutable
from sepc.runtime.gpu import Launch
from sepc.target import Target

if TYPE_CHECKING:
    from sepc._compile import Compiled

WORKERS = 2


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture.

    Attributes:
        architecture: its name. exact: whether other devices of the same generation do not run it. code: the file.
    """

    architecture: str
    exact: bool
    code: bytes

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability, (major, minor)."""
        return capability(self.architecture)


@dataclass(frozen=True)
class CudaBundle:
    """A specialisation for NVIDIA's GPUs.

    Attributes:
        c: what it has in common with a bundle for CPUs: names, inputs, outputs, calls, weights.
        source: all kernels as CUDA C. cubins: the latest architecture first. launches: of the kernels, by symbol.
    """

    c: Bundle
    source: str
    cubins: tuple[Cubin, ...]
    launches: Mapping[str, Launch]

    @staticmethod
    def of(name: str, target: Target, compiled: Compiled, form: str) -> CudaBundle:
        """The bundle of what was compiled, for every architecture that can run blocks of this size.

        Raises TargetError where there is none for this target or in this form, BuildError where nvcc fails.
        """
        executable = compiled.executable
        if not isinstance(executable, CudaExecutable):
            fix = "export for 'cuda', or take the sources of the kernels by source(region, 'opencl')"
            raise TargetError(f"There is no export for '{target.name}'", where="export", fix=fix)
        if form != "c":
            raise TargetError(f"There is no export for a GPU in the format '{form}'", where="export", fix="use 'c'")
        source = compiled.lowered.cuda_source()
        needed = max((one.shared_bytes for one in executable.resources.values()), default=0)
        fitting = [
            architecture
            for architecture in CUDA_ARCHITECTURES
            if needed <= GpuMachine.load(architecture).shared_kib_per_block << 10
        ]
        fitting.sort(key=capability, reverse=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            codes = pool.map(lambda architecture: compiled.lowered.cubin(source, architecture), fitting)
            cubins = tuple(Cubin(one, one in EMBEDDED, code) for one, code in zip(fitting, codes, strict=True))
        return CudaBundle(Bundle.of(name, target, compiled, b""), source, cubins, executable.launches)

    @property
    def symbols(self) -> list[str]:
        """The kernels, in a fixed order."""
        return sorted(self.c.kernels)

    def files(self) -> Iterator[tuple[str, bytes | memoryview]]:
        """Names and contents."""
        name = self.c.name
        templates = {"cuda.h": f"{name}.h", "cuda.c": f"{name}.c", "cuda_data.S": "data.S", "cuda_main.c": "main.c"}
        templates |= {"cuda_CMakeLists.txt": "CMakeLists.txt", "cuda_README.md": "README.md"}
        for template, file in templates.items():
            yield file, render(template, b=self.c, cuda=self).encode()
        yield "kernels.cu", self.source.encode()
        for cubin in self.cubins:
            yield f"kernels_{cubin.architecture}.cubin", cubin.code
        yield "weights.bin", self.c.weights

    def write(self, directory: Path) -> list[Path]:
        """Write the files into `directory`, which is made if need be. Raises ArtifactError if that cannot be."""
        return write_files(directory, self.files())
