"""The loops of a stage under a tiling, and the footprints of its operands: the distinct bytes that extents touch.

What halos and the rest of cache lines add is part of a footprint; `sepc.cost_model.traffic` propagates them outwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final, NamedTuple

from sepc.cost_model.tasks import task_counts
from sepc.cost_model.tiling import DenseTiling, LaneTiling, ProductTiling, Tiling, WinogradTiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.element import FLOAT32, Element
from sepc.ir.stage import Map, Normalization, Pooling, Stage

PAGE_BYTES: Final = 4096
LINE_BYTES: Final = 64
"""Caches hold lines: of those that hold only some channels of a pixel, all bytes are moved."""


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
    """Bytes of the operands of a stage: `activations` and `weights` are read, `results` are written, and `operands` are
    what the elementwise operators that follow read, where they compute results.

    `set_share` is the part of a first-level cache's sets that the activations can fall into; `read_strips` and
    `written_strips` are those of the activations and results of which only some channels of each pixel are touched. (A
    named tuple, as the search makes many.)
    """

    activations: float
    weights: float
    results: float
    operands: float = 0.0
    set_share: float = 1.0
    read_strips: float = 0.0
    written_strips: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.tensors + self.weights

    @property
    def tensors(self) -> float:
        """All but the weights."""
        return self.activations + self.results + self.operands

    @property
    def occupied(self) -> float:
        """Bytes of a first-level cache that they need, as the activations fall into `set_share` of its sets only."""
        return self.activations / self.set_share + self.weights + self.results + self.operands


Loop = tuple[str, int, int]  # axis, trips, elements of the axis that one trip covers
Measure = Callable[[Extents], Footprint]


def loops_of(stage: Stage, tiling: Tiling, lanes: int) -> tuple[list[Loop], Extents, Measure] | None:
    """The loops of all tasks, outermost first, what the innermost body extends over, and the footprints of extents.

    None for stages that read and write everything once.
    """
    match stage, tiling:
        case Convolution(), DenseTiling():
            return _dense_loops(stage, tiling)
        case Convolution(), ProductTiling():
            return _product_loops(tiling.product_of(stage), tiling)
        case Convolution(), LaneTiling():
            return _lanewise_loops(stage, tiling, lanes)
        case Pooling(), LaneTiling():
            return _pooling_loops(stage, tiling, lanes)
    return None


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
        read = _input_pixels(conv, e) * run_bytes(e.groups * conv.group_in, conv.in_channels, conv.element)
        weights = e.groups * channels * conv.group_in * e.tap_rows * e.tap_columns
        run = e.groups * channels
        written = _pixels(conv, e) * run_bytes(run, conv.out_channels, conv.element)
        return Footprint(
            read, conv.element.size_bytes * weights, written, written_strips=written if run < conv.out_channels else 0.0
        )

    return loops, Extents(columns=columns, channels=width), measure


def _product_loops(product: Convolution, tiling: ProductTiling) -> tuple[list[Loop], Extents, Measure]:
    """The products as so many rows of taps, each of which reads a row of its own."""
    together = replace(product, in_height=tiling.count, kernel=(tiling.count, 1))
    loops, body, measure = _dense_loops(together, tiling.product)
    if tiling.by_product:
        products = next(index for index, (axis, *_) in enumerate(loops) if axis == "tap_rows")
        blocks = max(index for index, (axis, *_) in enumerate(loops) if axis == "columns")
        loops.insert(blocks, loops.pop(products))
    if isinstance(tiling, WinogradTiling):
        return loops, body, _of_tiles(product, tiling, loops)
    return loops, body, _of_halves(measure)


def _of_halves(measure: Measure) -> Measure:
    """Of the input, four halves are read, and four sums of them; there are four results for each of a product."""

    def of_halves(e: Extents) -> Footprint:
        one = measure(e)
        activations = one.activations * 8 / 7
        return one._replace(activations=activations, results=4 * one.results, written_strips=4 * one.written_strips)

    return of_halves


def _of_tiles(product: Convolution, tiling: WinogradTiling, loops: list[Loop]) -> Measure:
    """Transformed inputs and products are scratch, which every task and every panel uses again."""
    task_tiles = next(step for axis, _, step in loops if axis == "columns")
    panel = sum(tiling.product.panel)
    slots = task_tiles if tiling.by_product else tiling.product.columns
    size = product.element.size_bytes

    def measure(e: Extents) -> Footprint:
        tiles, channels = min(e.columns, product.out_width), min(e.channels, product.out_channels)
        held = min(tiles, task_tiles)
        scratch = held * product.in_channels + min(held, slots) * min(channels, panel)
        pixels = tiles * tiling.outputs**2 / tiling.count
        written = e.tap_rows * pixels * run_bytes(channels, product.out_channels, product.element)
        return Footprint(
            size * e.tap_rows * (scratch + pixels * product.in_channels),
            size * e.tap_rows * product.in_channels * channels,
            written,
            written_strips=written if channels < product.out_channels else 0.0,
        )

    return measure


def _lanewise_loops(conv: Convolution, tiling: LaneTiling, lanes: int) -> tuple[list[Loop], Extents, Measure]:
    """Tasks, then channel groups, rows, column blocks, kernel rows; the body is one kernel row of one block."""
    width = min(lanes * tiling.group_vectors, conv.out_channels)
    block_width = min(lanes * tiling.vectors, conv.out_channels)
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
        ("channels", ceil_div(width, block_width), block_width),
        ("tap_rows", conv.kernel_rows, 1),
    ]

    def measure(e: Extents) -> Footprint:
        channels = min(e.channels, conv.out_channels)
        run = ceil_div(channels, conv.group_out) * conv.group_in
        read = _input_pixels(conv, e) * run_bytes(run, conv.in_channels, conv.element)
        weights = channels * conv.group_in * e.tap_rows * e.tap_columns
        written = _pixels(conv, e) * run_bytes(channels, conv.out_channels, conv.element)
        sets = set_share(channels, conv.out_channels, conv.element)
        strips = (read, written) if channels < conv.out_channels else (0.0, 0.0)
        return Footprint(read, conv.element.size_bytes * weights, written, 0.0, sets, *strips)

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
        run = run_bytes(channels, pool.channels, pool.element)
        in_images = e.batch * pool.depth.in_planes / pool.depth.out_planes if pool.depth else e.batch
        read, written = in_images * in_rows * in_columns * run, e.batch * out_rows * e.columns * run
        strips = (read, written) if channels < pool.channels else (0.0, 0.0)
        return Footprint(read, 0, written, 0.0, set_share(channels, pool.channels, pool.element), *strips)

    return loops, Extents(channels=width), measure


def run_bytes(channels: int, pixel_channels: int, element: Element = FLOAT32, line_bytes: int = LINE_BYTES) -> int:
    """Bytes of the lines that a run of `channels` neighbouring channels, out of `pixel_channels`, touches on average.

    Runs start at multiples of their own length within a pixel. Neighbouring pixels of few channels share lines.
    """
    run, pixel = element.size_bytes * channels, element.size_bytes * pixel_channels
    if run >= pixel:
        return pixel
    return min(pixel, run + line_bytes - math.gcd(run, pixel, line_bytes))


def set_share(channels: int, pixel_channels: int, element: Element = FLOAT32) -> float:
    """The part of a cache's sets that `channels` neighbouring channels out of `pixel_channels` of many pixels fall
    into.

    A first-level cache chooses the set by address bits within a page (4 KiB), so runs of bytes at a stride start
    gcd(stride, 4096) apart. Larger caches have more bits to choose by: there, the rule predicted misses that did not
    show.
    """
    size = element.size_bytes
    return min(1.0, channels * size / math.gcd(pixel_channels * size, PAGE_BYTES))


def set_lines(stride_channels: int, cache_bytes: int, element: Element = FLOAT32) -> int:
    """How many lines, as many channels apart, a first-level cache of that size can hold together."""
    apart = math.gcd(stride_channels * element.size_bytes, PAGE_BYTES)
    return cache_bytes // max(apart, LINE_BYTES)


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


def results_bytes(stage: Stage) -> int:
    """Bytes of the results."""
    return stage.element.size_bytes * _results(stage)


def _results(stage: Stage) -> int:
    match stage:
        case Convolution():
            return stage.pixels * stage.out_channels
        case Pooling():
            return stage.images * stage.out_height * stage.out_width * stage.channels
        case Normalization():
            return stage.pixels * stage.channels
        case Map():
            return math.prod(stage.extents)


def streamed_footprint(stage: Stage, operand_bytes: int = 0) -> Footprint:
    """The compulsory bytes: everything read or written once.

    All that a map reads are its operands; without any (`operand_bytes` is 0) it copies something of its size.
    """
    results, weights, size = results_bytes(stage), 0, stage.element.size_bytes
    match stage:
        case Convolution():
            everything = Extents(
                stage.images, 1, stage.out_height, stage.out_width, 1, stage.kernel_rows, stage.kernel[1]
            )
            read = size * _input_pixels(stage, everything) * stage.in_channels
            weights = size * (stage.out_channels * stage.group_in * stage.taps + stage.out_channels)
        case Pooling():
            images = stage.batch * (stage.depth.in_planes if stage.depth else 1)
            read = size * images * stage.in_height * stage.in_width * stage.channels
        case Normalization():
            read, weights = results, 2 * size * stage.channels
        case Map():
            read = 0 if operand_bytes else results
    return Footprint(read, weights, results, operand_bytes)
