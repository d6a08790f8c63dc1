"""Running what was compiled for another architecture: its bundle, cross-compiled, under QEMU's user emulation.

That tells whether results are right, not how fast they come.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import Array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from sepc.bundle.bundle import THREADS_TEMPLATES, Bundle
from sepc.c_compiler import cross_compiler, cross_package, run_compiler
from sepc.errors import ArtifactError, TargetError
from sepc.runtime.executable import view
from sepc.runtime.program import Program, Storage
from sepc.target import Target

NAME: Final = "model"
EMULATORS: Final = {
    "aarch64": ("qemu-aarch64-static", "qemu-aarch64"),
    "x86-64": ("qemu-x86_64-static", "qemu-x86_64"),
}


@dataclass(frozen=True)
class ForeignExecutable:
    """A program that this host cannot load.

    Attributes:
        target: what it was compiled for. threads: how many threads its work is divided for.
        program, constants, objects: as in `Bundle`; the name is `NAME`.
    """

    target: Target
    threads: int
    program: Program
    constants: torch.Tensor
    objects: bytes

    @property
    def library(self) -> bytes:
        """Not to be had: raises ArtifactError."""
        raise ArtifactError(
            f"A model for '{self.target.name}' cannot be saved on this host",
            why="a saved model is for the host that compiles it, with its PyTorch",
            fix='write it with export(directory, format="tvm") or format="c"',
        )

    def run(self, inputs: Sequence[torch.Tensor], threads: int, stamps: Array[Any] | None = None) -> list[torch.Tensor]:
        """As `Executable.run`, under emulation. Raises BuildError or TargetError if that fails."""
        storages = [torch.empty(storage.elements, dtype=storage.dtype) for storage in self.program.storages]
        with tempfile.TemporaryDirectory(prefix="sepc-") as name:
            paths = [Path(name) / str(index) for index in range(len(inputs) + len(storages))]
            for path, tensor, storage in zip(paths, inputs, self.program.inputs, strict=False):
                path.write_bytes(memory(tensor, storage))
            _, binary = self._built
            command = [emulator(self.target), str(binary), *map(str, paths)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                raise TargetError("The model failed under emulation", where=f"target='{self.target.name}'", why=why)
            for path, tensor in zip(paths[len(inputs) :], storages, strict=True):
                if tensor.numel():
                    content = bytearray(path.read_bytes())
                    tensor.copy_(torch.frombuffer(content, dtype=tensor.dtype, count=tensor.numel()))
        blocks = [torch.empty(0, dtype=torch.uint8), self.constants, *inputs, *storages]
        return [view(reference, blocks) for reference in self.program.results]

    def profile(self, inputs: Sequence[torch.Tensor], threads: int, repeats: int) -> dict[str, float]:
        """Emulation tells no times: raises TargetError."""
        self.target.require_runnable()
        raise TargetError("Emulation tells no times")

    @cached_property
    def _built(self) -> tuple[tempfile.TemporaryDirectory[str], Path]:
        """The program and the directory that keeps it, linked statically so that the emulator needs no libraries.

        If several threads come first at once, each builds one of its own.
        """
        owner = tempfile.TemporaryDirectory(prefix="sepc-")
        directory = Path(owner.name)
        bundle = Bundle(NAME, self.target.name, self.threads, self.program, self.constants, self.objects)
        bundle.write(directory)
        sources = ["main.c", f"{NAME}.c", "weights.S", "kernels.o"]
        if self.threads > 1:
            sources += [f"{NAME}_{name}" for name in THREADS_TEMPLATES if name.endswith(".c")]
        flags = ["-O1", "-static", "-pthread", "-I."]
        run_compiler([cross_compiler(self.target), *flags, "-o", NAME, *sources, "-lm"], directory)
        return owner, directory / NAME


def require_runner(target: Target) -> None:
    """Nothing, if what is compiled for `target` can run here, if only under emulation; raises TargetError otherwise."""
    if target.is_of_host_architecture:
        target.require_runnable()
        return
    emulator(target)
    cross_compiler(target)


def emulator(target: Target) -> str:
    """QEMU's user emulation of the target's architecture; raises TargetError where it is not installed."""
    names = EMULATORS[target.machine.architecture]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found:
        return found
    packages = f"qemu-user-static {cross_package(target)}"
    raise TargetError(
        f"This host cannot run code compiled for '{target.name}'",
        where=f"target='{target.name}'",
        why=f"it is of another architecture, and for emulation {names[0]} is not installed",
        fix=f"install it (Debian: apt install {packages}), name a device by runner=sepc.remote(address), or write it "
        "as C with export(directory)",
    )


def memory(tensor: torch.Tensor, storage: Storage) -> bytes:
    """The elements of an input as they lie in memory."""
    flat = tensor.detach().as_strided((storage.elements,), (1,))
    # A tensor without elements takes a byte: C has no arrays of none.
    return flat.contiguous().view(torch.uint8).numpy().tobytes() or bytes(1)
