"""Cost and tiling of a group normalisation: two phases over all pixels, with a barrier between them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Final

from sepc.cost_model.latency import Cost, time_of
from sepc.cost_model.loops import Footprint
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import Choice
from sepc.cost_model.tasks import busiest_share
from sepc.cost_model.tiling import RowTiling
from sepc.cost_model.traffic import Nest
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.group_normalization import GroupNormalization

MOST_TASKS_PER_THREAD: Final = 4
"""Tasks of an image per thread at most: each of them merges what all of them found."""
STATISTICS_INSTRUCTIONS: Final = 3
"""Additions, subtractions and multiply-adds per vector: the sum, the distance, its square."""
RESULT_CYCLES: Final = 3.5
"""Cycles per vector of results at least, however near the data are.

Ten sizes on a Zen 5 core, as the middle one of three normalisations: where all fits into the second level, 4 to 4.5
cycles were measured, where bytes and instructions alone take 2.4; with this, times are 0.8 to 1.3 times the predicted.
"""
MERGE_INSTRUCTIONS: Final = 6
"""What merging the statistics of a task takes per vector of channels."""
GROUP_CYCLES: Final = 60.0
"""What a group takes beside that: two horizontal sums, a root and a division."""


@lru_cache(maxsize=4096)
def choose_group_normalization(
    stage: GroupNormalization, machine: Machine, threads: int, *, epilogue_cost: int = 0, operand_bytes: int = 0
) -> Choice:
    """The tiling of least predicted time for `stage`; arguments and errors as of `sepc.cost_model.search.choose`."""
    if stage.flops == 0:
        raise ValueError(f"{stage} computes nothing: no batch, map or channel may be 0")
    counts = {min(stage.pixels, count) for count in range(1, MOST_TASKS_PER_THREAD * threads + 1)}
    choices = (
        Choice(tiling, predict_group_normalization(stage, tiling, machine, threads, epilogue_cost, operand_bytes))
        for tiling in (RowTiling(ceil_div(stage.pixels, count)) for count in sorted(counts))
    )
    return min(choices, key=lambda one: one.cost.time_us)


def predict_group_normalization(
    stage: GroupNormalization,
    tiling: RowTiling,
    machine: Machine,
    threads: int,
    epilogue_cost: int = 0,
    operand_bytes: int = 0,
) -> Cost:
    """The cost of `stage` under `tiling`: that of the statistics, and that of the results."""
    tiles = ((stage.images, 1), (stage.pixels, tiling.rows))
    share, size = busiest_share(tiles, threads), stage.element.size_bytes * stage.images * stage.pixels * stage.channels
    vectors = len(split_lanes(stage.channels, machine.lanes(stage.element)))
    pixels, per_image = stage.images * stage.pixels, ceil_div(stage.pixels, tiling.rows)
    tasks = ceil_div(stage.images * per_image, threads)
    wide = stage.element.per_float32  # All of it is in float32.
    adding = wide * STATISTICS_INSTRUCTIONS / machine.fma_per_cycle
    statistics = pixels * vectors * max(adding, 2 / machine.loads_per_cycle)
    results = pixels * vectors * max((2 * wide + epilogue_cost) / machine.fma_per_cycle, wide * RESULT_CYCLES)
    merging = tasks * (per_image * vectors * MERGE_INSTRUCTIONS / machine.fma_per_cycle + stage.groups * GROUP_CYCLES)
    read = Footprint(share * size, 0.0, 0.0)
    written = Footprint(share * (size + operand_bytes), 2 * stage.element.size_bytes * stage.channels, share * size)
    return _together(
        _cost(stage.flops // 2, statistics * share, read, machine, threads),
        _cost(stage.flops - stage.flops // 2, results * share + merging, written, machine, threads),
        machine,
    )


def _cost(flops: int, cycles: float, own: Footprint, machine: Machine, threads: int) -> Cost:
    """The cost of a phase of which the busiest thread takes `cycles` and touches `own`, each once."""
    nest = Nest((), (own,), threads, 1.0)
    fetched = [nest.into_cache(cache.size_per_core_bytes(threads)) for cache in machine.levels[:-1]]
    return time_of(flops, cycles, fetched, machine, threads, own.total * threads)


def _together(first: Cost, second: Cost, machine: Machine) -> Cost:
    """The cost of one phase after the other."""
    longest = max(first, second, key=lambda cost: cost.time_us)
    levels = zip(first.bytes_per_level, second.bytes_per_level, strict=True)
    return replace(
        longest,
        flops=first.flops + second.flops,
        compute_us=first.compute_us + second.compute_us,
        bytes_per_level=tuple((name, one + other) for (name, one), (_, other) in levels),
        bytes_moved=first.bytes_moved + second.bytes_moved,
        time_us=first.time_us + second.time_us + machine.barrier_us,
    )
