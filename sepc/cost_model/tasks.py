"""The tasks that a kernel is cut into, and how evenly threads share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from sepc.cost_model.tiling import DenseTiling, LaneTiling, ProductTiling, RowTiling, Tiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.stage import Map, Normalization, Pooling, Stage


def task_tiles(stage: Stage, tiling: Tiling, lanes: int) -> tuple[tuple[int, int], ...]:
    """The task space that the backend's kernel shares out, outermost dimension first: its extent, and how much of it
    one task takes (the last one less).
    """
    if isinstance(stage, Convolution) and isinstance(tiling, ProductTiling):
        stage, tiling = tiling.product_of(stage), tiling.product
    match stage, tiling:
        case Convolution(), DenseTiling():
            repeat = max(segment.repeat for segment in stage.column_segments(tiling.columns))
            panels = ceil_div(stage.group_out, sum(tiling.panel))
            tiles = ((stage.out_height, tiling.rows), (repeat, tiling.blocks), (panels, tiling.panels))
            return ((stage.images, 1), (stage.groups, 1), *tiles)
        case Convolution(), LaneTiling():
            repeat = max(segment.repeat for segment in stage.column_segments(tiling.columns))
            columns = (repeat, tiling.blocks or repeat)
            groups = lane_groups(stage.out_channels, tiling, lanes)
            return ((stage.images, 1), (stage.out_height, tiling.rows), columns, groups)
        case Pooling(), LaneTiling():
            return ((stage.images, 1), (stage.out_height, tiling.rows), lane_groups(stage.channels, tiling, lanes))
        case Normalization(), RowTiling():
            return ((stage.pixels, tiling.rows),)
        case Map(), RowTiling():
            if len(stage.extents) == 1:
                return ((max(1, stage.extents[0] // (2 * lanes)), tiling.rows),)
            return (*((extent, 1) for extent in stage.extents[:-2]), (stage.extents[-2], tiling.rows))
    raise TypeError(f"{type(stage).__name__} cannot be tiled by {type(tiling).__name__}")


def task_counts(stage: Stage, tiling: Tiling, lanes: int) -> tuple[int, ...]:
    """Tasks along each dimension of the task space, outermost first."""
    return tuple(ceil_div(extent, tile) for extent, tile in task_tiles(stage, tiling, lanes))


def shares_rows(stage: Stage, tiling: Tiling, lanes: int, threads: int) -> bool:
    """Whether each of `threads` threads computes some rows or columns of the images, with all of their channels.

    Threads take runs of tasks, of which those that differ in channels alone follow each other.
    """
    counts = task_counts(stage, tiling, lanes)
    if not isinstance(stage, Convolution | Pooling):
        return True
    if isinstance(stage, Convolution) and stage.groups > 1 and not isinstance(tiling, LaneTiling):
        return counts[0] >= threads
    return counts[-1] == 1 or math.prod(counts[:-1]) >= threads


MOST_COUNTED_TASKS: Final = 64


def busiest_share(tiles: Sequence[tuple[int, int]], threads: int) -> float:
    """The part of the work of a task space that the busiest of `threads` threads does.

    Threads take runs of tasks of equal number; the last tile of a dimension may be smaller than the others, which is
    counted where tasks are few enough to matter.
    """
    tasks = math.prod(ceil_div(extent, tile) for extent, tile in tiles)
    if threads == 1 or tasks == 0:
        return 1.0
    if tasks > MOST_COUNTED_TASKS:
        return ceil_div(tasks, threads) / tasks
    sizes = [1]
    for extent, tile in tiles:
        pieces = [min(tile, extent - start) for start in range(0, extent, tile)]
        sizes = [size * piece for size in sizes for piece in pieces]
    shares = (sum(sizes[t * tasks // threads : (t + 1) * tasks // threads]) for t in range(threads))
    return max(shares) / sum(sizes)


def lane_groups(channels: int, tiling: LaneTiling, lanes: int) -> tuple[int, int]:
    """Groups of channel vectors of a lanewise stage, and how many a task takes."""
    return ceil_div(channels, lanes * tiling.group_vectors), tiling.groups
