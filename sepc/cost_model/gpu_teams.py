"""Tilings and times of what reduces, by teams of threads: softmax, layer and RMS normalisations, and global poolings.

A thread by itself goes through a row, or an image, item by item, and waits for each; and there may be fewer rows than a
GPU has threads. A team shares the items, and pays for combining what its members came to (`TeamTiling`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

from sepc.cost_model.gpu_blocks import BARRIER_CYCLES
from sepc.cost_model.gpu_latency import Grid
from sepc.cost_model.gpu_machine import GpuMachine, lanes_of
from sepc.cost_model.gpu_tasks import REGISTERS, THREADS, cost_of_blocks
from sepc.cost_model.latency import Cost
from sepc.cost_model.loops import Footprint, streamed_footprint
from sepc.cost_model.search import Choice
from sepc.cost_model.tasks import task_counts
from sepc.cost_model.tiling import LaneTiling, RowTiling, TeamTiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.stage import Normalization, Pooling, Softmax, Stage

MEMBERS: Final = (4, 8, 16, 32, 64, 128, 256)
COMBINE_INSTRUCTIONS: Final = 6
"""Per step, and per number that is combined: two loads, an operation, a store, and the address."""


class _Reduction(NamedTuple):
    """What teams share of a stage.

    Attributes:
        task: one task. tasks: how many there are. items: what a team goes through for each.
        row_wise, width: as in `TeamTiling`. even: whether all tasks are alike, so that a block may have several.
        combined: how often the members combine what they came to.
    """

    task: LaneTiling | RowTiling
    tasks: int
    items: int
    row_wise: bool
    width: int
    even: bool
    combined: int


def _reduction(stage: Stage) -> _Reduction | None:
    """What teams may share of `stage`; None if nothing."""
    lanes = lanes_of(stage.element)
    match stage:
        case Normalization():
            combined = 1 + (stage.subtract_mean or isinstance(stage, Softmax))
            items = ceil_div(stage.channels, lanes)
            return _Reduction(RowTiling(1), stage.pixels, items, row_wise=True, width=1, even=True, combined=combined)
        case Pooling() if stage.is_global:
            task = LaneTiling(1, 1, 1, 1)
            planes = stage.depth.in_planes if stage.depth else 1
            tasks, items = math.prod(task_counts(stage, task, lanes)), planes * stage.in_height * stage.in_width
            even = stage.channels % lanes == 0
            return _Reduction(task, tasks, items, row_wise=False, width=lanes, even=even, combined=1)
    return None


@lru_cache(maxsize=4096)
def choose_teams(stage: Stage, machine: GpuMachine, epilogue_cost: int, operand_bytes: int) -> Choice | None:
    """The tiling of least predicted time for `stage`, which has work; None where teams would have nothing to share."""
    costs = {
        tiling: predict_teams(stage, tiling, machine, epilogue_cost, operand_bytes)
        for tiling in team_tilings(stage, machine)
    }
    best = min(costs, key=lambda tiling: costs[tiling].time_us, default=None)
    return None if best is None else Choice(best, costs[best])


def team_tilings(stage: Stage, machine: GpuMachine) -> Iterator[TeamTiling]:
    """The tilings of `stage` that are considered, all of which `machine` can hold."""
    shared = _reduction(stage)
    if shared is None:
        return
    for members in MEMBERS:
        if members >= 2 * shared.items or members > machine.threads_per_block:
            return
        # No block has a team without a task: its threads would be missing at barriers.
        most = max(1, THREADS // members) if shared.even else 1
        teams = math.gcd(shared.tasks, most)
        yield TeamTiling(shared.task, members, teams, shared.row_wise, shared.width)


def team_footprint(stage: Stage, tiling: TeamTiling, operand_bytes: int = 0) -> Footprint:
    """Bytes that all blocks load and store, each what it touches once."""
    shared, whole = _reduction(stage), streamed_footprint(stage, operand_bytes)
    if shared is None:
        raise ValueError(f"{stage} has nothing for teams to share")
    weights = 0
    if isinstance(stage, Normalization) and not isinstance(stage, Softmax):
        weights = stage.element.size_bytes * stage.channels * (1 + stage.subtract_mean)
    return whole._replace(weights=weights * (shared.tasks // tiling.teams))


def predict_teams(
    stage: Stage, tiling: TeamTiling, machine: GpuMachine, epilogue_cost: int = 0, operand_bytes: int = 0
) -> Cost:
    """The cost of `stage` under `tiling`; arguments as of `sepc.cost_model.latency.predict`."""
    shared = _reduction(stage)
    if shared is None:
        raise ValueError(f"{stage} has nothing for teams to share")
    whole = streamed_footprint(stage, operand_bytes)
    results = whole.results / stage.element.size_bytes
    per_item = (stage.flops + results * (epilogue_cost + 1)) / (shared.tasks * shared.items)
    steps = shared.combined * (2 + tiling.members.bit_length() - 1)
    instructions = ceil_div(shared.items, tiling.members) * per_item + steps * COMBINE_INSTRUCTIONS * shared.width
    resident = machine.resident_blocks(tiling.threads, REGISTERS, tiling.shared_bytes)
    grid = Grid(shared.tasks // tiling.teams, resident, machine)
    l2_bytes = team_footprint(stage, tiling, operand_bytes).total
    waiting = steps * BARRIER_CYCLES
    return cost_of_blocks(stage.flops, grid, tiling.threads, instructions, whole, l2_bytes, waiting)
