"""CUDA C to machine code, by nvcc, and what its assembler tells of each kernel. Results are kept on disk by the source.

``SEPC_CACHE`` and ``SEPC_CACHE_DIR`` apply, as to compiled models.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from sepc.cache_store import Blobs
from sepc.errors import BuildError, TargetError

WORKERS: Final = 2
"""Runs of nvcc at a time: each takes some hundred MB."""

_FLAGS: Final = ("-O3", "-cubin", "-Xptxas", "-v", "-diag-suppress", "177,1046")
_RECIPE: Final = "again with all registers where some are spilled"
"""What else machine code on disk depends on: change it with the steps of `compile_source`."""
_ENTRY: Final = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What the assembler tells of a kernel: registers of a thread, bytes spilled, shared memory that it declares."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture, and what each kernel in it uses, by symbol."""

    code: bytes
    usage: Mapping[str, Usage]


def compile_source(source: str, architecture: str) -> Cubin:
    """The machine code of CUDA C for an architecture, such as "sm_80", from disk if it was compiled before.

    Raises:
        BuildError: nvcc is missing, or refuses the source. TargetError: it does not know the architecture.
    """
    compiler = nvcc()
    store = Blobs.open()
    parts = (source, architecture, _version(compiler), _RECIPE, *_FLAGS)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if store is not None and (found := store.read(key)) is not None:
        kept, _, log = found.partition(_SEPARATOR)
        return Cubin(kept, parse_usage(log.decode()))
    code, told = _run(compiler, source, architecture)
    if spilling := [symbol for symbol, usage in parse_usage(told).items() if usage.spilled_bytes]:
        code, told = _run(compiler, with_all_registers(source, spilling), architecture)
    if store is not None:
        store.write(key, code + _SEPARATOR + told.encode())
    return Cubin(code, parse_usage(told))


def with_all_registers(source: str, symbols: Sequence[str]) -> str:
    """`source` with kernels that may take all registers, if but one block of them fits a multiprocessor then.

    By itself, the assembler spills a few where that lets one more block in.
    """
    names = "|".join(symbols)
    return re.sub(rf"__launch_bounds__\((\d+)\) (?={names})", r"__launch_bounds__(\1, 1) ", source)


def _run(compiler: str, source: str, architecture: str) -> tuple[bytes, str]:
    """The machine code, and what the assembler tells."""
    with tempfile.TemporaryDirectory(prefix="sepc-") as name:
        file = Path(name) / "kernels.cu"
        file.write_text(source)
        command = [compiler, f"-arch={architecture}", *_FLAGS, "-o", "kernels.cubin", file.name]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _refused(done.stderr, architecture, command)
        return (Path(name) / "kernels.cubin").read_bytes(), done.stderr


_SEPARATOR: Final = b"\nwhat ptxas told\n"


def parse_usage(log: str) -> dict[str, Usage]:
    """What ptxas tells of each kernel with ``-v``, by symbol."""
    found = {}
    for match in _ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        found[match["name"]] = Usage(int(match["registers"]), spilled, int(shared[1]) if shared else 0)
    return found


def nvcc() -> str:
    """NVIDIA's compiler: that of ``$CUDA_HOME``, else the one on the PATH. Raises BuildError if there is none."""
    home = os.environ.get("CUDA_HOME", "")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    if path := found or shutil.which("nvcc"):
        return path
    raise BuildError(
        "There is no CUDA compiler",
        where="nvcc",
        why="kernels for NVIDIA's GPUs are compiled by nvcc, which is neither in $CUDA_HOME/bin nor on the PATH",
        fix="install the CUDA toolkit, 12 or later, or compile with target='opencl'",
    )


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _refused(told: str, architecture: str, command: list[str]) -> BuildError | TargetError:
    lines = [line for line in told.splitlines() if "error" in line or "fatal" in line] or told.splitlines()[-1:]
    why = lines[0] if lines else "it tells nothing"
    if "Unsupported gpu architecture" in why or "not defined for option 'gpu-architecture'" in why:
        return TargetError(
            f"This CUDA compiler does not know the architecture '{architecture}'",
            where=" ".join(command[:2]),
            why=why,
            fix="install a CUDA toolkit that does, or name another target",
        )
    return BuildError("The CUDA compiler failed", where=" ".join(command), why=why)
