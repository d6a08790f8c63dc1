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
from sepc.errors import ArtifactError, BuildError, TargetError
from sepc.runtime.executable import view
from sepc.runtime.program import Program, Storage
from sepc.target import Target

NAME: Final = "model"
COMPILERS: Final = {"aarch64": "aarch64-linux-gnu-gcc", "x86-64": "x86_64-linux-gnu-gcc"}
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
            why="a saved model holds a shared library, which is linked where it is to be loaded",
            fix="write it as C with export(directory), or compile and save it on a host of that architecture",
        )

    def run(self, inputs: Sequence[torch.Tensor], threads: int, stamps: Array[Any] | None = None) -> list[torch.Tensor]:
        """As `Executable.run`, under emulation. Raises BuildError or TargetError if that fails."""
        storages = [torch.empty(storage.elements, dtype=storage.dtype) for storage in self.program.storages]
        with tempfile.TemporaryDirectory(prefix="sepc-") as name:
            paths = [Path(name) / str(index) for index in range(len(inputs) + len(storages))]
            for path, tensor, storage in zip(paths, inputs, self.program.inputs, strict=False):
                path.write_bytes(_memory(tensor, storage))
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
        command = [compiler(self.target), "-O1", "-static", "-pthread", "-I.", "-o", NAME, *sources, "-lm"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise BuildError("The cross compiler failed", where=" ".join(command), why=why)
        return owner, directory / NAME


def require_runner(target: Target) -> None:
    """Nothing, if what is compiled for `target` can run here, if only under emulation; raises TargetError otherwise."""
    if target.is_of_host_architecture:
        target.require_runnable()
        return
    emulator(target)
    compiler(target)


def emulator(target: Target) -> str:
    """QEMU's user emulation of the target's architecture; raises TargetError where it is not installed."""
    names = EMULATORS[target.machine.architecture]
    return next((found for name in names if (found := shutil.which(name))), None) or _missing(target, names[0])


def compiler(target: Target) -> str:
    """The cross compiler for the target's architecture; raises TargetError where it is not installed."""
    name = COMPILERS[target.machine.architecture]
    return shutil.which(name) or _missing(target, name)


def _missing(target: Target, name: str) -> str:
    packages = f"gcc-{COMPILERS[target.machine.architecture].removesuffix('-gcc')}".replace("_", "-")
    raise TargetError(
        f"This host cannot run code compiled for '{target.name}'",
        where=f"target='{target.name}'",
        why=f"it is of another architecture, and for emulation {name} is not installed",
        fix=f"install it (Debian: apt install qemu-user-static {packages}), or write it as C with export(directory)",
    )


def _memory(tensor: torch.Tensor, storage: Storage) -> bytes:
    """The elements of an input as they lie in memory."""
    flat = tensor.detach().as_strided((storage.elements,), (1,))
    # A tensor without elements takes a byte: C has no arrays of none.
    return flat.contiguous().view(torch.uint8).numpy().tobytes() or bytes(1)
