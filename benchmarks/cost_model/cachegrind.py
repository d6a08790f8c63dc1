"""Last-level traffic of one kernel by valgrind's cachegrind.

The kernel is linked into a small program, which calls it once or twice. What the second call adds is what a kernel does
that finds the caches as a kernel before it has left them; start-up and the harness cancel out. Cachegrind replaces the
least recently used line, allocates lines on writes, knows no prefetching, and counts no write-backs. So its traffic is

    (read misses + write misses of the last level) × line:

each line read from behind the last level once, and each line that is written without having been there once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.cost_model.kernels import declarations
from sepc.backends.arguments import Result, Scratch
from sepc.backends.build import compile_objects
from sepc.backends.regions import LoweredKernel
from sepc.c_compiler import c_compiler
from sepc.passes.plan_memory import GAP_BYTES
from sepc.target import Target

LINE_BYTES: Final = 64


@dataclass(frozen=True)
class Caches:
    """First- and last-level cache of the simulated machine."""

    first_bytes: int
    first_ways: int
    last_bytes: int
    last_ways: int

    @property
    def options(self) -> list[str]:
        """Cachegrind's options."""
        first = f"{self.first_bytes},{self.first_ways},{LINE_BYTES}"
        last = f"{self.last_bytes},{self.last_ways},{LINE_BYTES}"
        return ["--cache-sim=yes", f"--I1={first}", f"--D1={first}", f"--LL={last}"]


@dataclass(frozen=True)
class Traffic:
    """Bytes per call from (or to) behind a cache level."""

    first_read: float
    first_written: float
    last_read: float
    last_written: float

    @property
    def last(self) -> float:
        """All of the last level's."""
        return self.last_read + self.last_written


def is_installed() -> bool:
    """Whether valgrind can be run."""
    return shutil.which("valgrind") is not None


def program_source(kernel: LoweredKernel, input_bytes: tuple[int, ...], result_bytes: int) -> str:
    """A C program that calls `kernel` as often as its first argument says, on one thread."""
    offsets, end = [], 0
    for argument in kernel.arguments:
        offsets.append(end)
        if isinstance(argument, Result):
            size = result_bytes
        elif isinstance(argument, int):
            size = input_bytes[argument]
        elif isinstance(argument, Scratch):
            size = argument.bytes_per_thread
        else:
            size = argument.nbytes
        end += -(-size // LINE_BYTES) * LINE_BYTES + GAP_BYTES
    pointers = "".join(f"memory + {offset}, " for offset in offsets)
    lines = [
        "#include <stdint.h>",
        "#include <stdlib.h>",
        *declarations({kernel.name: len(kernel.arguments)}),
        # Memory that nobody has written to is zero; no kernel's control flow depends on values.
        f"static char memory[{end}] __attribute__((aligned(4096)));",
        "int main(int count, char** arguments) {",
        "  int calls = count > 1 ? atoi(arguments[1]) : 1;",
        f"  for (int i = 0; i < calls; ++i) {kernel.name}({pointers}0, 1);",
        "  return 0;",
        "}",
    ]
    return "\n".join(lines) + "\n"


def build_program(
    kernel: LoweredKernel, input_bytes: tuple[int, ...], result_bytes: int, target: Target, directory: Path
) -> Path:
    """The executable of `program_source` in `directory`."""
    objects = compile_objects({kernel.name: kernel.function}, target, directory)
    source, program = directory / "program.c", directory / "program"
    source.write_text(program_source(kernel, input_bytes, result_bytes))
    command = [c_compiler(), "-O1", "-o", str(program), str(source), *map(str, objects), "-lm"]
    subprocess.run(command, check=True, capture_output=True)
    return program


def measure(program: Path, caches: Caches) -> Traffic:
    """What the second call of the kernel in `program` moves."""
    once, twice = (_misses(program, caches, calls) for calls in (1, 2))
    moved = {event: (twice[event] - once[event]) * LINE_BYTES for event in once}
    return Traffic(moved["D1mr"], moved["D1mw"], moved["DLmr"], moved["DLmw"])


def _misses(program: Path, caches: Caches, calls: int) -> dict[str, int]:
    output = program.with_name(f"cachegrind.{calls}")
    command = ["valgrind", "--tool=cachegrind", *caches.options, f"--cachegrind-out-file={output}"]
    subprocess.run([*command, str(program), str(calls)], check=True, capture_output=True)
    return parse_summary(output.read_text())


def parse_summary(text: str) -> dict[str, int]:
    """Total of each event in a file of cachegrind's; raises ValueError if there is none."""
    events = re.search(r"^events: (.*)$", text, re.MULTILINE)
    totals = re.search(r"^summary: (.*)$", text, re.MULTILINE)
    if events is None or totals is None:
        raise ValueError("cachegrind's output has no summary")
    return dict(zip(events[1].split(), map(int, totals[1].split()), strict=True))
