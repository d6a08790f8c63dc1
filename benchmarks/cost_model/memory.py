"""Memory: the arena of a model unfused, fused for time and fused for memory."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Final

import sepc
from benchmarks import models
from benchmarks.cost_model.regions import captured, run_passes
from benchmarks.cost_model.results import Report
from sepc.backends.lowering import CpuLowering
from sepc.backends.program import assemble
from sepc.target import Target

MODEL: Final = "mobilenetv2_100"
SIZES: Final = (224, 1024)
MIB: Final = 1024 * 1024
GOAL: Final = 1 / 3


@dataclass(frozen=True)
class Arenas:
    """Bytes of the arena, scratch of the kernels included; `for_memory` is 0 where that cannot be compiled for."""

    size: int
    unfused: int
    for_time: int
    for_memory: int


def arena_bytes(model: str, size: int, *, fuse: bool, threads: int) -> int:
    """The arena of `model`, compiled for time, with or without fusion."""
    target = Target.parse("native")
    module, inputs = models.load(model, size)
    graph_module = captured(module, inputs)
    without = () if fuse else ("fuse",)
    run_passes(graph_module, target, threads, "canonicalize", "plan-memory", without=without)
    return assemble(graph_module, CpuLowering(target.vector_lanes), threads).program.arena_bytes


def arena_bytes_for_memory(model: str, size: int, threads: int) -> int:
    """The arena of `model` compiled for memory; 0 where `sepc.compile` has no such option."""
    if "optimize" not in inspect.signature(sepc.compile).parameters:
        return 0
    module, inputs = models.load(model, size)
    compiled = sepc.compile(module, example_inputs=inputs, num_threads=threads, optimize="memory")
    return compiled.arena_bytes


def run(*, quick: bool = False, threads: int = 1) -> Report:
    """The arenas at every size."""
    rows = [
        Arenas(
            size,
            arena_bytes(MODEL, size, fuse=False, threads=threads),
            arena_bytes(MODEL, size, fuse=True, threads=threads),
            arena_bytes_for_memory(MODEL, size, threads),
        )
        for size in SIZES[: 1 if quick else None]
    ]
    return report_of(rows, threads)


def report_of(rows: list[Arenas], threads: int) -> Report:
    """The table, and a line per size."""
    columns = ["size", "unfused MiB", "for time MiB", "for memory MiB"]
    report = Report("memory", f"Arena of {MODEL}, {threads} thread(s)", columns)
    for row in rows:
        report.rows.append([row.size, row.unfused / MIB, row.for_time / MIB, row.for_memory / MIB])
        if not row.for_memory:
            report.summary.append(f"Memory at {row.size}: skipped, sepc.compile has no optimize='memory' yet")
            continue
        share = row.for_memory / row.unfused
        report.summary.append(
            f"Memory at {row.size}: {row.for_memory / MIB:.2f} MiB for memory, {row.for_time / MIB:.2f} for time, "
            f"{row.unfused / MIB:.2f} unfused: {share:.1%} of the unfused plan (goal at {SIZES[0]}: {GOAL:.0%})"
        )
    report.settings = {"threads": threads}
    return report
