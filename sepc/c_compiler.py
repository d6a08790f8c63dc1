"""The system's C compiler, which links kernels and builds the measuring program of `sepc.calibrate`, and others."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sepc.errors import BuildError, TargetError
from sepc.target import Target

CROSS_COMPILERS: Final = {"aarch64": "aarch64-linux-gnu-gcc", "x86-64": "x86_64-linux-gnu-gcc"}


def c_compiler() -> str:
    """The system's C compiler: ``$CC``, else cc, gcc or clang. Raises BuildError if there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError(
        "There is no C compiler",
        why="sepc links its kernels with the system's one; neither $CC nor cc, gcc or clang is on the PATH",
        fix="install gcc or clang",
    )


def cross_compiler(target: Target) -> str:
    """The C compiler for the target's architecture: the system's own for that of this host.

    Raises BuildError or TargetError where there is none.
    """
    if target.is_of_host_architecture:
        return c_compiler()
    name = CROSS_COMPILERS[target.machine.architecture]
    if found := shutil.which(name):
        return found
    raise TargetError(
        f"This host cannot link code compiled for '{target.name}'",
        where=f"target='{target.name}'",
        why=f"it is of another architecture, and {name} is not installed",
        fix=f"install it (Debian: apt install {cross_package(target)}), or write it as C with export(directory)",
    )


def cross_package(target: Target) -> str:
    """Debian's package with the cross compiler for a target."""
    return f"gcc-{CROSS_COMPILERS[target.machine.architecture].removesuffix('-gcc')}".replace("_", "-")


def run_compiler(command: Sequence[str], directory: Path) -> None:
    """Run a compiler in `directory`; raises BuildError with what it says if it fails."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BuildError("The C compiler failed", where=" ".join(command), why=why)
