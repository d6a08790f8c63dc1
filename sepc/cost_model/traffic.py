"""Bytes that a stage under a tiling moves between the memory levels, by footprint propagation through its loops.

A stage is a nest of loops over axes, and operands whose footprint (distinct bytes touched) is a function of how far
each axis extends. Going outwards from the body, the extents grow, and with them the footprints: halos are what the
footprint of an input has more than its share of the outputs. A cache that replaces the least recently used line keeps
an operand from one use to the next if what is touched in between fits. So, for each operand and each loop outwards,

    bytes ×= footprint of the loop / footprint of its body    where the operand varies over the loop, and its body fits
    bytes ×= 1                                                where it does not, and a pass over it fits
    bytes ×= trips                                            otherwise.

That yields re-reads of weights per row tile, of the input per panel, halo re-reads, and the compulsory bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sepc.cost_model.loops import Extents, Footprint, Loop, Measure, loops_of, results_bytes, streamed_footprint
from sepc.cost_model.tasks import busiest_share, task_tiles
from sepc.cost_model.tiling import Tiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.stage import Stage

GRADUAL_OVERFLOW: Final = 1.05
"""A working set of this many times a cache's size gets no hits from it any more.

Under strict replacement of the least recently used line that would be 1; bytes agree with such a simulated cache only
near 1. Real caches are less strict. On the few kernels of a Zen 5 core for which it was tried (6 to 11), the choice of
tilings was the same between 1.05 and 1.7; more have not been looked at.
"""
UNFORESEEN_STRIPS: Final = 0.35
"""Part of what is read in strips that takes as long as strips do, even where pixels stay in the cache until whole.

Depthwise layers of MobileNet V1 on Zen 5: with 0, layers of 1.6 to 3.2 MB that come from the third level were predicted
7 to 16 % too fast, and those of 51 MB that come from DRAM 17 to 23 %.
"""


OPERANDS: Final = 4
"""The first fields of a footprint: activations, weights, results, and what the epilogue reads."""
FIRST_AT_THE_END: Final = 2
"""From this one on they are touched once all has been added up."""


@dataclass(frozen=True)
class Nest:
    """The loops that one thread executes.

    Attributes:
        trips: trips of each loop, outermost first.
        footprints: what one pass over the whole of loop d touches; one entry more than loops: the last is the body's.
        tasks: tasks of all threads together.
        share: the part of the tasks that the busiest thread executes.
    """

    trips: tuple[int, ...]
    footprints: tuple[Footprint, ...]
    tasks: int
    share: float

    def into_cache(self, capacity_bytes: float, *, first_level: bool = False) -> Footprint:
        """Bytes that one thread fetches into (or stores through) a cache of `capacity_bytes`; none if all of it fits.

        In the first level, activations need the more room the fewer of the cache's sets they fall into.
        """
        sizes = [(one.occupied if first_level else one.total) / capacity_bytes for one in self.footprints]
        if sizes[0] <= 1:
            return Footprint(0.0, 0.0, 0.0)
        loops = [index for index, trips in enumerate(self.trips) if trips > 1]
        activations, weights, results, operands = (
            self._operand(operand, loops, sizes, capacity_bytes) for operand in range(OPERANDS)
        )
        read_strips = written_strips = 0.0
        for index in loops:
            # The loop over channels, after which pixels are whole: too late if the first ones have left the cache.
            inside, around = self.footprints[index + 1], self.footprints[index]
            least = UNFORESEEN_STRIPS if inside.read_strips else 0.0
            if inside.read_strips and not around.read_strips:
                read_strips = max(least, missing_part(sizes[index])) * activations
            if inside.written_strips and not around.written_strips:
                written_strips = max(least, missing_part(sizes[index])) * results
        read_strips = min(read_strips, activations) + (written_strips / results * operands if results else 0.0)
        return Footprint(
            activations, weights, results, operands, read_strips=read_strips, written_strips=written_strips
        )

    def _operand(self, operand: int, loops: list[int], sizes: list[float], capacity_bytes: float) -> float:
        """What is moved of one operand, from the innermost of `loops` outwards.

        A loop over which the operand varies adds what is new, and the overlap (halo) again if the body does not fit.
        One over which it does not vary finds it in the cache if what is touched between two uses fits: one pass over
        the next loop inside over which it varies, and of operands that this pass only repeats the next iteration's too.
        """
        footprints = self.footprints
        # The body streams through what it reads; its results wait in registers until all has been added to them.
        missing = missing_part(sizes[-1]) if operand < FIRST_AT_THE_END else 0.0
        moved, inside = footprints[-1][operand], -1
        for index in reversed(loops):
            after, before = footprints[index + 1][operand], footprints[index][operand]
            if before > after:
                missing = missing_part(sizes[index + 1])
                moved *= missing * self.trips[index] + (1 - missing) * before / after
                inside = index
                continue
            if inside >= 0:
                repeated = sum(
                    footprints[inside][other]
                    for other in range(OPERANDS)
                    if footprints[index][other] > footprints[index + 1][other]
                    and footprints[inside][other] == footprints[inside + 1][other]
                )
                missing = missing_part(sizes[index + 1] + repeated / capacity_bytes)
                inside = -1
            moved *= 1 + missing * (self.trips[index] - 1)
        # The next call finds what is left of this one.
        if inside >= 0 or not loops:
            missing = missing_part(sizes[0])
        return moved - (1 - missing) * footprints[0][operand]


def missing_part(needed: float) -> float:
    """The part of a working set of `needed` times a cache's size that is not found there when it is needed again.

    Real caches replace not quite the least recently used line: what hardly does not fit, hits in part.
    """
    return min(1.0, max(0.0, needed - 1) / (GRADUAL_OVERFLOW - 1))


def nest_of(stage: Stage, tiling: Tiling, lanes: int, threads: int, operand_bytes: int = 0) -> Nest:
    """The loops of the busiest of `threads` threads; `operand_bytes`: all of the operands that the epilogue reads."""
    tiles = task_tiles(stage, tiling, lanes)
    counts = tuple(ceil_div(extent, tile) for extent, tile in tiles)
    tasks = math.prod(counts)
    own_tasks = ceil_div(tasks, threads)
    share = busiest_share(tiles, threads)
    found = loops_of(stage, tiling, lanes)
    if found is None:
        whole = streamed_footprint(stage, operand_bytes)
        own = Footprint(share * whole.activations, whole.weights, share * whole.results, share * whole.operands)
        return Nest((), (own,), tasks, share)
    return _own_nest(counts, own_tasks, share, *found, operand_bytes / max(1, results_bytes(stage)))


def _own_nest(
    counts: tuple[int, ...],
    own_tasks: int,
    share: float,
    loops: list[Loop],
    body: Extents,
    measure: Measure,
    operand_per_result_byte: float,
) -> Nest:
    """Cut the task loops (the first of `loops`) down to one thread's tasks and add up footprints from the body
    outwards.
    """
    trips = [trip for _, trip, _ in loops]
    rest = own_tasks
    for index in reversed(range(len(counts))):
        trips[index] = min(counts[index], rest)
        rest = ceil_div(rest, counts[index])
    extents = body

    def footprint() -> Footprint:
        touched = measure(extents)
        return touched._replace(operands=operand_per_result_byte * touched.results)

    footprints = [footprint()]
    for (axis, _, step), trip in zip(reversed(loops), reversed(trips), strict=True):
        if trip > 1:
            extents = extents._replace(**{axis: max(getattr(extents, axis), trip * step)})
            footprints.append(footprint())
        else:
            footprints.append(footprints[-1])
    return Nest(tuple(trips), tuple(reversed(footprints)), math.prod(counts), share)
