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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from sepc.cost_model.tasks import busiest_share, task_counts, task_tiles
from sepc.cost_model.tiling import DenseTiling, LaneTiling, StrassenTiling, Tiling
from sepc.ir.stage import Convolution, Map, Normalization, Pooling, Stage, ceil_div

FP32_BYTES: Final = 4
PAGE_BYTES: Final = 4096
LINE_BYTES: Final = 64
"""Caches hold lines: of those that hold only some channels of a pixel, all bytes are moved."""
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


class Extents(NamedTuple):
    """How far the axes of a stage extend, in elements; channels are those of one group."""

    batch: int = 1
    groups: int = 1
    rows: int = 1
    columns: int = 1
    channels: int = 1
    tap_rows: int = 1
    tap_columns: int = 1


class Footprint(NamedTuple):
    """Bytes of the operands of a stage: `activations` and `weights` are read, `results` are written.

    `set_share` is the part of a first-level cache's sets that the activations can fall into; `read_strips` and
    `written_strips` are those of the activations and results of which only some channels of each pixel are touched. (A
    named tuple, as the search makes many.)
    """

    activations: float
    weights: float
    results: float
    set_share: float = 1.0
    read_strips: float = 0.0
    written_strips: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.activations + self.weights + self.results

    @property
    def occupied(self) -> float:
        """Bytes of a first-level cache that they need, as the activations fall into `set_share` of its sets only."""
        return self.activations / self.set_share + self.weights + self.results


OPERANDS: Final = 3
"""The first fields of a footprint: activations, weights, results."""


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
        activations, weights, results = (
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
        return Footprint(
            activations, weights, results, read_strips=min(read_strips, activations), written_strips=written_strips
        )

    def _operand(self, operand: int, loops: list[int], sizes: list[float], capacity_bytes: float) -> float:
        """What is moved of one operand, from the innermost of `loops` outwards.

        A loop over which the operand varies adds what is new, and the overlap (halo) again if the body does not fit.
        One over which it does not vary finds it in the cache if what is touched between two uses fits: one pass over
        the next loop inside over which it varies, and of operands that this pass only repeats the next iteration's too.
        """
        footprints = self.footprints
        moved, missing, inside = footprints[-1][operand], 0.0, -1
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
    match stage, tiling:
        case Convolution(), DenseTiling():
            loops, body, measure = _dense_loops(stage, tiling)
        case Convolution(halves=Convolution() as half), StrassenTiling():
            loops, body, measure = _strassen_loops(half, tiling)
        case Convolution(), LaneTiling():
            loops, body, measure = _lanewise_loops(stage, tiling, lanes)
        case Pooling(), LaneTiling():
            loops, body, measure = _pooling_loops(stage, tiling, lanes)
        case _:
            whole = streamed_footprint(stage, operand_bytes)
            own = Footprint(share * whole.activations, whole.weights, share * whole.results)
            return Nest((), (own,), tasks, share)
    results_bytes = max(1, _results_bytes(stage))
    return _own_nest(counts, own_tasks, share, loops, body, measure, operand_bytes / results_bytes)


Loop = tuple[str, int, int]  # axis, trips, elements of the axis that one trip covers
Measure = Callable[[Extents], Footprint]


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
        extra = operand_per_result_byte * touched.results
        return touched._replace(activations=touched.activations + extra) if extra else touched

    footprints = [footprint()]
    for (axis, _, step), trip in zip(reversed(loops), reversed(trips), strict=True):
        if trip > 1:
            extents = extents._replace(**{axis: max(getattr(extents, axis), trip * step)})
            footprints.append(footprint())
        else:
            footprints.append(footprints[-1])
    return Nest(tuple(trips), tuple(reversed(footprints)), math.prod(counts), share)


def _input_span(outputs: int, stride: int, taps: int, dilation: int, available: int) -> int:
    """Input positions that `outputs` neighbouring outputs read through `taps` taps; strides leave gaps where taps are
    few.
    """
    touched_each = min(taps * outputs, (outputs - 1) * stride + (taps - 1) * dilation + 1)
    return min(touched_each, available)


def _dense_loops(conv: Convolution, tiling: DenseTiling) -> tuple[list[Loop], Extents, Measure]:
    """Tasks, then panels, rows, column blocks, and the taps; the body is one tap of one block."""
    width = min(sum(tiling.panel), conv.group_out)
    columns = min(tiling.columns, conv.out_width)
    rows = min(tiling.rows, conv.out_height)
    panels = min(tiling.panels, ceil_div(conv.group_out, width))
    counts = task_counts(conv, tiling, max(tiling.panel))
    # Blocks are counted in the row's interior; its borders belong to the first and the last task.
    task_columns = ceil_div(conv.out_width, max(1, counts[3]))
    loops: list[Loop] = [
        ("batch", counts[0], 1),
        ("groups", counts[1], 1),
        ("rows", counts[2], rows),
        ("columns", counts[3], task_columns),
        ("channels", counts[4], width * panels),
        ("channels", panels, width),
        ("rows", rows, 1),
        ("columns", ceil_div(task_columns, columns), columns),
        ("tap_rows", conv.kernel_rows, 1),
        ("tap_columns", conv.kernel[1], 1),
    ]

    def measure(e: Extents) -> Footprint:
        channels = min(e.channels, conv.group_out)
        read = _input_pixels(conv, e) * run_bytes(e.groups * conv.group_in, conv.in_channels)
        weights = e.groups * channels * conv.group_in * e.tap_rows * e.tap_columns
        run = e.groups * channels
        written = _pixels(conv, e) * run_bytes(run, conv.out_channels)
        return Footprint(
            read, FP32_BYTES * weights, written, written_strips=written if run < conv.out_channels else 0.0
        )

    return loops, Extents(columns=columns, channels=width), measure


def _strassen_loops(half: Convolution, tiling: StrassenTiling) -> tuple[list[Loop], Extents, Measure]:
    """The seven products as seven rows of taps, each of which reads a row of its own.

    Of the input, four halves are read, and four sums of them; there are four results for each of a product.
    """
    together = replace(half, in_height=7, kernel=(7, 1))
    loops, body, product = _dense_loops(together, tiling.half)
    if tiling.by_product:
        products = next(index for index, (axis, *_) in enumerate(loops) if axis == "tap_rows")
        blocks = max(index for index, (axis, *_) in enumerate(loops) if axis == "columns")
        loops.insert(blocks, loops.pop(products))

    def measure(e: Extents) -> Footprint:
        one = product(e)
        activations = one.activations * 8 / 7
        return one._replace(activations=activations, results=4 * one.results, written_strips=4 * one.written_strips)

    return loops, body, measure


def _lanewise_loops(conv: Convolution, tiling: LaneTiling, lanes: int) -> tuple[list[Loop], Extents, Measure]:
    """Tasks, then channel groups, rows, column blocks, kernel rows; the body is one kernel row of one block."""
    width = min(lanes * tiling.vectors, conv.out_channels)
    columns = min(tiling.columns, conv.out_width)
    rows = min(tiling.rows, conv.out_height)
    groups = min(tiling.groups, ceil_div(conv.out_channels, width))
    counts = task_counts(conv, tiling, lanes)
    task_columns = ceil_div(conv.out_width, max(1, counts[2]))
    loops: list[Loop] = [
        ("batch", counts[0], 1),
        ("rows", counts[1], rows),
        ("columns", counts[2], task_columns),
        ("channels", counts[3], width * groups),
        ("channels", groups, width),
        ("rows", rows, 1),
        ("columns", ceil_div(task_columns, columns), columns),
        ("tap_rows", conv.kernel_rows, 1),
    ]

    def measure(e: Extents) -> Footprint:
        channels = min(e.channels, conv.out_channels)
        read = _input_pixels(conv, e) * run_bytes(ceil_div(channels, conv.group_out) * conv.group_in, conv.in_channels)
        weights = channels * conv.group_in * e.tap_rows * e.tap_columns
        written = _pixels(conv, e) * run_bytes(channels, conv.out_channels)
        sets = set_share(channels, conv.out_channels)
        strips = (read, written) if channels < conv.out_channels else (0.0, 0.0)
        return Footprint(read, FP32_BYTES * weights, written, sets, *strips)

    return loops, Extents(columns=columns, channels=width, tap_columns=conv.kernel[1]), measure


def _pooling_loops(pool: Pooling, tiling: LaneTiling, lanes: int) -> tuple[list[Loop], Extents, Measure]:
    """Tasks, then channel groups, rows, columns; the body is one window."""
    width = min(lanes * tiling.vectors, pool.channels)
    rows = min(tiling.rows, pool.out_height)
    groups = min(tiling.groups, ceil_div(pool.channels, width))
    counts = task_counts(pool, tiling, lanes)
    strides = (pool.in_height / max(1, pool.out_height), pool.in_width / max(1, pool.out_width))
    steps = strides if pool.adaptive else (float(pool.stride[0]), float(pool.stride[1]))
    loops: list[Loop] = [
        ("batch", counts[0], 1),
        ("rows", counts[1], rows),
        ("channels", counts[2], width * groups),
        ("channels", groups, width),
        ("rows", rows, 1),
        ("columns", pool.out_width, 1),
    ]

    def measure(e: Extents) -> Footprint:
        channels, out_rows = min(e.channels, pool.channels), min(e.rows, pool.out_height)
        in_rows = min(pool.in_height, (out_rows - 1) * steps[0] + pool.window[0])
        in_columns = min(pool.in_width, (e.columns - 1) * steps[1] + pool.window[1])
        run = run_bytes(channels, pool.channels)
        in_images = e.batch * pool.depth.in_planes / pool.depth.out_planes if pool.depth else e.batch
        read, written = in_images * in_rows * in_columns * run, e.batch * out_rows * e.columns * run
        strips = (read, written) if channels < pool.channels else (0.0, 0.0)
        return Footprint(read, 0, written, set_share(channels, pool.channels), *strips)

    return loops, Extents(channels=width), measure


def run_bytes(channels: int, pixel_channels: int) -> int:
    """Bytes of the lines that a run of `channels` neighbouring channels, out of `pixel_channels`, touches on average.

    Runs start at multiples of their own length within a pixel. Neighbouring pixels of few channels share lines.
    """
    run, pixel = FP32_BYTES * channels, FP32_BYTES * pixel_channels
    if run >= pixel:
        return pixel
    return min(pixel, run + LINE_BYTES - math.gcd(run, pixel, LINE_BYTES))


def set_share(channels: int, pixel_channels: int) -> float:
    """The part of a cache's sets that `channels` neighbouring channels out of `pixel_channels` of many pixels fall
    into.

    A first-level cache chooses the set by address bits within a page (4 KiB), so runs of bytes at a stride start
    gcd(stride, 4096) apart. Larger caches have more bits to choose by: there, the rule predicted misses that did not
    show.
    """
    return min(1.0, channels * FP32_BYTES / math.gcd(pixel_channels * FP32_BYTES, PAGE_BYTES))


def _input_pixels(conv: Convolution, e: Extents) -> int:
    rows, columns = min(e.rows, conv.out_height), min(e.columns, conv.out_width)
    tap_rows, images = min(e.tap_rows, conv.kernel[0]), e.batch
    if depth := conv.depth:
        tap_planes = ceil_div(e.tap_rows, conv.kernel[0])
        images = _input_span(e.batch, depth.stride, tap_planes, depth.dilation, conv.batch * depth.in_planes)
    in_rows = _input_span(rows, conv.stride[0], tap_rows, conv.dilation[0], conv.in_height)
    return images * in_rows * _input_span(columns, conv.stride[1], e.tap_columns, conv.dilation[1], conv.in_width)


def _pixels(conv: Convolution, e: Extents) -> int:
    return e.batch * min(e.rows, conv.out_height) * min(e.columns, conv.out_width)


def _results_bytes(stage: Stage) -> int:
    match stage:
        case Convolution():
            return FP32_BYTES * stage.pixels * stage.out_channels
        case Pooling():
            return FP32_BYTES * stage.images * stage.out_height * stage.out_width * stage.channels
        case Normalization():
            return FP32_BYTES * stage.pixels * stage.channels
        case Map():
            return FP32_BYTES * math.prod(stage.extents)


def streamed_footprint(stage: Stage, operand_bytes: int = 0) -> Footprint:
    """The compulsory bytes: everything read or written once.

    All that a map reads are its operands; without any (`operand_bytes` is 0) it copies something of its size.
    """
    results, weights = _results_bytes(stage), 0
    match stage:
        case Convolution():
            everything = Extents(
                stage.images, 1, stage.out_height, stage.out_width, 1, stage.kernel_rows, stage.kernel[1]
            )
            read = FP32_BYTES * _input_pixels(stage, everything) * stage.in_channels
            weights = FP32_BYTES * (stage.out_channels * stage.group_in * stage.taps + stage.out_channels)
        case Pooling():
            images = stage.batch * (stage.depth.in_planes if stage.depth else 1)
            read = FP32_BYTES * images * stage.in_height * stage.in_width * stage.channels
        case Normalization():
            read, weights = results, 2 * FP32_BYTES * stage.channels
        case Map():
            read = 0 if operand_bytes else results
    return Footprint(read + operand_bytes, weights, results)
