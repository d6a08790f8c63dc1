"""GPU: bytes from and to global memory of neighbouring layers, apart and as planned, by the package's own planner.

Pairs of a depthwise and a pointwise convolution in either order, as FusePlanner (arXiv 2404.19331) fuses them, and
whole inverted residuals (pointwise, depthwise, pointwise), which it does not; for the GPUs of that paper. Bytes are
what the blocks of a kernel load and store, each of them what it touches once (`sepc.cost_model.gpu_traffic`).

Two plans are told. The planner's own: tilings and fusion of least predicted time; where fusing takes longer, the plan
saves nothing, and where it gains time although blocks load more, which a second-level cache serves, it saves less than
nothing. And, to compare with FusePlanner, which goes by these bytes: tilings and fusion of fewest bytes, of those with
a block for every multiprocessor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, pairwise
from typing import Final

import networkx as nx
import torch
from torch import nn

from benchmarks import models
from benchmarks.cost_model.proxylessnas import proxylessnas
from benchmarks.cost_model.regions import captured, run_passes
from benchmarks.cost_model.results import Report
from sepc.cost_model.gpu_latency import GpuProblem
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_planner import GpuPlanner
from sepc.cost_model.gpu_search import one_per_shape
from sepc.cost_model.gpu_tiling import GpuTiling, is_depthwise
from sepc.cost_model.work import Work
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.passes.sequences import find_sequences, work_of
from sepc.target import Target

GPUS: Final = {"GTX 1660": "sm_75_gtx_1660", "RTX A4000": "sm_86", "Jetson AGX Orin": "sm_87"}
"""Those of the paper, and their descriptions."""
MODELS: Final = ("mobilenetv1_100", "mobilenetv2_100", "proxylessnas", "xception41")
PUBLISHED_SAVING: Final = 0.83
PAIR: Final = 2
HEADINGS: Final = (
    *("apart KiB", "fused KiB", "apart µs", "fused µs", "kernels", "saved %"),
    *("apart KiB, fewest", "planned KiB, fewest", "saved %, fewest"),
)


@dataclass(frozen=True)
class Piece:
    """Layers as one kernel, or as several.

    Attributes:
        time_us: predicted. global_bytes: from and to global memory, under the quickest tilings.
        least_bytes: the same under the tilings of fewest bytes.
    """

    time_us: float
    global_bytes: float
    least_bytes: float


@dataclass(frozen=True)
class Group:
    """Neighbouring layers of a model on a GPU.

    Attributes:
        gpu, model: which. layers: what they are.
        apart: one kernel each. fused: one kernel of all; None if there is none.
        planned: the quickest way through them. kernels: how many it takes.
        least_bytes: of the way with fewest.
    """

    gpu: str
    model: str
    layers: tuple[str, ...]
    apart: Piece
    fused: Piece | None
    planned: Piece
    kernels: int
    least_bytes: float

    @property
    def saving(self) -> float:
        """The part of the bytes that the planner's plan saves."""
        return 1 - self.planned.global_bytes / self.apart.global_bytes

    @property
    def saving_by_bytes(self) -> float:
        """The part that the plan of fewest bytes saves."""
        return 1 - self.least_bytes / self.apart.least_bytes


@cache
def piece_of(works: tuple[Work, ...], planner: GpuPlanner) -> Piece | None:
    """`works` as one kernel under its best tiling; None if there is none."""
    found = planner.choose_chain(works) if len(works) > 1 else planner.choose(works[0])
    if found is None or not isinstance(found.tiling, GpuTiling):
        return None
    links = tuple(work.stage for work in works if isinstance(work.stage, Convolution))
    costs, operands = [work.epilogue_cost for work in works], [work.operand_bytes for work in works]
    problem = GpuProblem(links, planner.machine, costs, operands)
    return Piece(found.cost.time_us, problem.global_bytes(found.tiling), least_bytes(problem))


def least_bytes(problem: GpuProblem) -> float:
    """The fewest bytes that any tiling moves which has a block for every multiprocessor, if one has."""
    last, found = problem.links[-1], dict[bool, float]()
    for tiling in one_per_shape(problem).values():
        tiles = ((last.out_height, tiling.rows), (last.out_width, tiling.columns), (last.out_channels, tiling.channels))
        blocks = last.batch * math.prod(ceil_div(extent, size) for extent, size in tiles)
        is_enough = blocks >= problem.machine.multiprocessors
        found[is_enough] = min(found.get(is_enough, math.inf), problem.global_bytes(tiling))
    return found.get(True) or found[False]


def plan(works: tuple[Work, ...], gpu: str, model: str, planner: GpuPlanner) -> Group | None:
    """The quickest way through `works`; None if one of them has no kernel by itself."""
    ways: nx.DiGraph[int] = nx.DiGraph()
    for begin, end in combinations(range(len(works) + 1), 2):
        piece = piece_of(works[begin:end], planner)
        if piece is not None:
            ways.add_edge(begin, end, piece=piece, time_us=piece.time_us, least_bytes=piece.least_bytes)
    steps = list(pairwise(range(len(works) + 1)))
    if not all(ways.has_edge(*step) for step in steps):
        return None
    whole = ways.edges[0, len(works)]["piece"] if ways.has_edge(0, len(works)) else None
    taken = list(pairwise(nx.shortest_path(ways, 0, len(works), weight="time_us")))
    apart, planned = (_sum([ways.edges[step]["piece"] for step in path]) for path in (steps, taken))
    least = nx.shortest_path_length(ways, 0, len(works), weight="least_bytes")
    return Group(gpu, model, tuple(map(_describe, works)), apart, whole, planned, len(taken), least)


def _sum(pieces: Sequence[Piece]) -> Piece:
    return Piece(*(sum(getattr(one, field.name) for one in pieces) for field in fields(Piece)))


def load(model: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model and its inputs."""
    return proxylessnas() if model == "proxylessnas" else models.load(model)


def sequences_of(model: str) -> list[tuple[Work, ...]]:
    """Runs of convolutions of a model, each the only reader of the one before it."""
    module, inputs = load(model)
    graph_module = captured(module, inputs)
    run_passes(graph_module, Target.parse("cuda:sm_80"), 1, "promote", "group")
    return [tuple(work_of(link) for link in sequence.links) for sequence in find_sequences(graph_module)]


def groups_in(sequences: Sequence[tuple[Work, ...]]) -> Iterator[tuple[Work, ...]]:
    """Pairs of a depthwise and a pointwise layer, and inverted residuals; each distinct one once."""
    runs = [
        works[begin:end]
        for works in sequences
        for begin, end in combinations(range(len(works) + 1), PAIR)
        if end > begin + 1
    ]
    for run in dict.fromkeys(runs):
        if "".join(map(_letter, run)) in ("dp", "pd", "pdp"):
            yield run


def _letter(work: Work) -> str:
    """d for depthwise, p for pointwise, x for anything else."""
    stage = work.stage
    if not isinstance(stage, Convolution) or stage.depth is not None:
        return "x"
    if is_depthwise(stage):
        return "d"
    return "p" if stage.groups == stage.taps == 1 else "x"


def _describe(work: Work) -> str:
    stage = work.stage
    assert isinstance(stage, Convolution)
    kind = f"dw{stage.kernel[0]}" if is_depthwise(stage) else "pw"
    return f"{kind} {stage.in_channels}→{stage.out_channels} @{stage.out_height}"


def run(*, quick: bool = False) -> Report:
    """Plan the groups of layers of the models for all GPUs."""
    found: list[Group] = []
    for model in MODELS[: 1 if quick else None]:
        sequences = sequences_of(model)
        for gpu, machine in GPUS.items():
            planner = GpuPlanner(GpuMachine.load(machine))
            planned = (plan(works, gpu, model, planner) for works in groups_in(sequences))
            found += [group for group in planned if group is not None]
    return report_of(found)


def report_of(groups: Sequence[Group]) -> Report:
    """The table, and what it comes to per GPU and model."""
    report = Report(
        "gpu",
        "Global memory traffic of neighbouring layers by the planner, fp32, batch 1 (FusePlanner: arXiv 2404.19331)",
        ["GPU", "model", "layers", *HEADINGS],
    )
    for one in groups:
        fused: list[str | float] = ["no kernel", "–"]
        if one.fused is not None:
            fused = [one.fused.global_bytes / 1024, one.fused.time_us]
        by_time = [one.apart.global_bytes / 1024, fused[0], one.apart.time_us, fused[1], one.kernels, 100 * one.saving]
        by_bytes = [one.apart.least_bytes / 1024, one.least_bytes / 1024, 100 * one.saving_by_bytes]
        report.rows.append([one.gpu, one.model, ", ".join(one.layers), *by_time, *by_bytes])
    for gpu in dict.fromkeys(one.gpu for one in groups):
        report.summary.append(_summary([one for one in groups if one.gpu == gpu and len(one.layers) == PAIR], gpu))
        blocks = [one for one in groups if one.gpu == gpu and len(one.layers) > PAIR]
        if blocks:
            report.summary.append(_summary(blocks, gpu))
    report.summary.append(
        f"FusePlanner reports up to {PUBLISHED_SAVING:.0%} less for pairs on these GPUs, and fuses no three layers. "
        "Bytes are planned, not measured. 'kernels' is how many the quickest plan has: where fusing is predicted to "
        "take longer, layers stay apart, and nothing is saved."
    )
    return report


def _summary(groups: Sequence[Group], gpu: str) -> str:
    what = "pairs" if len(groups[0].layers) == PAIR else "whole inverted residuals"
    whole = sum(one.kernels == 1 for one in groups)
    best, least = max(groups, key=lambda one: one.saving), max(groups, key=lambda one: one.saving_by_bytes)
    by_time = 1 - sum(one.planned.global_bytes for one in groups) / sum(one.apart.global_bytes for one in groups)
    by_bytes = 1 - sum(one.least_bytes for one in groups) / sum(one.apart.least_bytes for one in groups)
    return (
        f"{gpu}: {whole} of {len(groups)} {what} become one kernel in the quickest plan, which saves at most "
        f"{best.saving:.0%} of global bytes ({best.model}: {', '.join(best.layers)}), {by_time:.0%} over all; the plan "
        f"of fewest bytes at most {least.saving_by_bytes:.0%} ({least.model}: {', '.join(least.layers)}), "
        f"{by_bytes:.0%} over all"
    )
