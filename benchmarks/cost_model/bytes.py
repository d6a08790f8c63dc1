"""Bytes: last-level traffic as the cost model predicts it, against cachegrind's, over all kinds of regions.

Both sides count a line once for each time it passes into the last cache, whether it is read or written; write-backs are
left out on both. The model is asked about a machine with just these two caches, on one thread.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from benchmarks.cost_model import cachegrind
from benchmarks.cost_model.kernels import lower_region
from benchmarks.cost_model.regions import (
    FLOAT_BYTES,
    Region,
    captured,
    merge_all,
    own_regions,
    run_passes,
    with_machine,
)
from benchmarks.cost_model.results import Report, median_and_p90
from sepc.backends.regions import LoweredKernel
from sepc.cost_model.latency import Cost
from sepc.cost_model.machine import Machine
from sepc.cost_model.tiling import Tiling
from sepc.target import Target

KIB: Final = 1024
FIRST_LEVEL: Final = (32 * KIB, 8)
TILINGS_PER_REGION: Final = 3
GOAL: Final = (0.10, 0.25)


class Gate(nn.Module):
    """`inner(x)` times a factor per channel and image, as in squeeze-and-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.rand(1, channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate


class Sum(nn.Module):
    """`x + relu(x)`, or `inner(x) + x`."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.inner(x) + x
        return total


class ChannelsLast(nn.Module):
    """Layer normalisation of the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalized: torch.Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normalized


class Mlp(nn.Module):
    """Layer norm over channels, two linear layers with GELU between, and the input added, as in ConvNeXt."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.inner = nn.Sequential(nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.inner(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return result


@dataclass(frozen=True)
class Case:
    """A region to simulate: a module, its input's (channels, size), and the size of the last-level cache."""

    name: str
    build: Callable[[], nn.Module]
    channels: int
    size: int
    last_kib: int
    chain: bool = False


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def depthwise(channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)


def _chain(*modules: nn.Module) -> nn.Module:
    """The modules with an activation between them."""
    return nn.Sequential(*[part for module in modules for part in (module, nn.ReLU6())][:-1])


def _inverted(inputs: int, inner: int, outputs: int, stride: int = 1) -> nn.Module:
    return _chain(pointwise(inputs, inner), depthwise(inner, 3, stride), pointwise(inner, outputs))


CASES: Final = (
    Case("pointwise 28² 96→192", lambda: pointwise(96, 192), 96, 28, 256),
    Case("pointwise 56² 24→144", lambda: pointwise(24, 144), 24, 56, 512),
    Case("pointwise 14² 384→96", lambda: pointwise(384, 96), 384, 14, 256),
    Case("pointwise 7² 320→640", lambda: pointwise(320, 640), 320, 7, 256),
    Case("pointwise 56² 64→24 /2", lambda: nn.Conv2d(64, 24, 1, 2), 64, 56, 256),
    Case("dense 3×3 28² 32→64", lambda: nn.Conv2d(32, 64, 3, 1, 1), 32, 28, 256),
    Case("dense 3×3 14² 96→96", lambda: nn.Conv2d(96, 96, 3, 1, 1), 96, 14, 256),
    Case("dense 3×3/2 112² 3→32", lambda: nn.Conv2d(3, 32, 3, 2, 1), 3, 112, 256),
    Case("dense 7×7/2 112² 3→32", lambda: nn.Conv2d(3, 32, 7, 2, 3), 3, 112, 512),
    Case("depthwise 3×3 56² 96", lambda: depthwise(96), 96, 56, 512),
    Case("depthwise 3×3 28² 256", lambda: depthwise(256), 256, 28, 256),
    Case("depthwise 5×5/2 56² 72", lambda: depthwise(72, 5, 2), 72, 56, 256),
    Case("depthwise 7×7 28² 96", lambda: depthwise(96, 7), 96, 28, 256),
    Case("max pooling 3×3/2 56² 64", lambda: nn.MaxPool2d(3, 2, 1), 64, 56, 256),
    Case("global average 28² 256", lambda: nn.AdaptiveAvgPool2d(1), 256, 28, 256),
    Case("layer norm 28² 192", lambda: ChannelsLast(192), 192, 28, 256),
    Case("sum 28² 192", Sum, 192, 28, 256),
    Case("gate 28² 192", lambda: Gate(192), 192, 28, 256),
    Case("pw+dw 28² 32→96", lambda: _chain(pointwise(32, 96), depthwise(96)), 32, 28, 256, True),
    Case("pw+dw/2 56² 16→64", lambda: _chain(pointwise(16, 64), depthwise(64, 3, 2)), 16, 56, 256, True),
    Case("dw+pw 56² 48→24", lambda: _chain(depthwise(48), pointwise(48, 24)), 48, 56, 256, True),
    Case("dw+pw 28² 128→128", lambda: _chain(depthwise(128), pointwise(128, 128)), 128, 28, 256, True),
    Case("pw+dw/2+pw 56² 16→96→24", lambda: _inverted(16, 96, 24, 2), 16, 56, 256, True),
    Case("pw+dw+pw+x 28² 24→144→24", lambda: Sum(_inverted(24, 144, 24)), 24, 28, 256, True),
    Case("pw+dw+pw 14² 96→384→96", lambda: _inverted(96, 384, 96), 96, 14, 256, True),
    Case("pw+pw 28² 48→192→48", lambda: _chain(pointwise(48, 192), pointwise(192, 48)), 48, 28, 256, True),
    Case("norm+pw+pw+x 28² 48→192→48", lambda: Mlp(48, 192), 48, 28, 256, True),
    Case("silu+pw 28² 192→48", lambda: nn.Sequential(nn.SiLU(), pointwise(192, 48)), 192, 28, 256, True),
    Case(
        "conv7/2+max pool 112² 3→32",
        lambda: nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        3,
        112,
        256,
        True,
    ),
)


@dataclass(frozen=True)
class Pair:
    """A region under a tiling: what the model and what cachegrind say, in bytes."""

    case: Case
    tiling: str
    predicted: Cost
    measured: cachegrind.Traffic

    @property
    def predicted_bytes(self) -> float:
        """The model's bytes from and to behind the last cache."""
        return self.predicted.bytes_per_level[-1][1]

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted_bytes - self.measured.last) / max(self.measured.last, cachegrind.LINE_BYTES)


def machine_with(last_bytes: int, base: Machine) -> Machine:
    """`base` with the two simulated caches and no other."""
    first, second = base.levels[:2]
    levels = (replace(first, size_bytes=FIRST_LEVEL[0]), replace(second, size_bytes=last_bytes), base.dram)
    return replace(base, levels=levels)


def region_of(case: Case, target: Target) -> Region:
    """The region that `case` describes, planned for `target`."""
    x = torch.randn(1, case.channels, case.size, case.size).contiguous(memory_format=torch.channels_last)
    graph_module = captured(case.build(), (x,))
    run_passes(graph_module, target, 1, "canonicalize", "group")
    if case.chain:
        merge_all(graph_module)
    run_passes(graph_module, target, 1, "plan-layout", "choose-tiling")
    # Results are copied to the strides of eager PyTorch by a region of its own.
    return next(found for found in own_regions(graph_module) if found.kind != "copy")


def run(*, quick: bool = False) -> Report:
    """Simulate every case under its chosen tiling and a few others."""
    base = Target.parse("x86-64-v3")
    jobs: list[tuple[Case, Region, Tiling, Target, LoweredKernel]] = []
    for case in CASES[:: 4 if quick else 1]:
        target = with_machine(base, machine_with(case.last_kib * KIB, base.machine))
        found = region_of(case, target)
        others = found.alternatives(target.machine, 1, 40, random.Random(0))
        picked = random.Random(1).sample(others, min(len(others), TILINGS_PER_REGION - 1))
        jobs += [
            (case, found, tiling, target, lower_region(found, tiling, target.vector_lanes))
            for tiling in (found.chosen.tiling, *picked)
        ]
    with ThreadPoolExecutor(2) as pool:
        return report_of(list(pool.map(lambda job: _simulate(*job), jobs)))


def _simulate(case: Case, found: Region, tiling: Tiling, target: Target, kernel: LoweredKernel) -> Pair:
    caches = cachegrind.Caches(*FIRST_LEVEL, case.last_kib * KIB, 16)
    inputs = tuple(FLOAT_BYTES * elements for elements in found.input_elements)
    with tempfile.TemporaryDirectory(prefix="sepc-cachegrind-") as name:
        program = cachegrind.build_program(kernel, inputs, FLOAT_BYTES * found.result_elements, target, Path(name))
        measured = cachegrind.measure(program, caches)
    return Pair(case, str(tiling), found.predict(tiling, target.machine, 1), measured)


def report_of(pairs: list[Pair]) -> Report:
    """The table and the two figures of `pairs`."""
    columns = ["region", "LL KiB", "predicted KiB", "cachegrind KiB", "error %", "read KiB", "written KiB", "tiling"]
    report = Report("bytes", "Last-level traffic of one call: cost model and cachegrind", columns)
    for pair in pairs:
        sizes = (pair.predicted_bytes, pair.measured.last)
        halves = (pair.measured.last_read, pair.measured.last_written)
        cells = [*(size / KIB for size in sizes), 100 * pair.error, *(half / KIB for half in halves)]
        report.rows.append([pair.case.name, pair.case.last_kib, *cells, pair.tiling])
    median, high = median_and_p90([pair.error for pair in pairs])
    report.summary.append(
        f"Bytes: {len(pairs)} pairs, relative error median {median:.1%} (goal {GOAL[0]:.0%}), "
        f"90th percentile {high:.1%} (goal {GOAL[1]:.0%})"
    )
    report.settings = {
        "target": "x86-64-v3",
        "first_level_bytes_and_ways": FIRST_LEVEL,
        "last_level_ways": 16,
        "line_bytes": cachegrind.LINE_BYTES,
        "measured": "misses of the second of two calls × line, reads and writes, no write-backs, no prefetching",
        "predicted": "Cost.bytes_per_level of the level behind the last cache, one thread",
    }
    return report
