"""The choice of a `GpuTiling`: enumerate the tilings that a GPU can hold, and take the one of least predicted time.

Shared memory per block, registers per thread, threads per block, and both memories per multiprocessor are hard
constraints. Tiles are even parts of the result. First the shape of a block is chosen, then the register block of the
last link among a few; those of the links before it are the quickest by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Final, NamedTuple

from sepc.cost_model.gpu_blocks import registers_of
from sepc.cost_model.gpu_latency import GpuProblem
from sepc.cost_model.gpu_machine import VECTOR, GpuMachine
from sepc.cost_model.gpu_tiling import GpuLink, GpuTiling, Tile, is_dense, is_depthwise, link_tiles, shared_bytes
from sepc.cost_model.gpu_traffic import Links
from sepc.cost_model.search import Choice
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution

PIXELS: Final = (1, 2, 4, 8)
"""Columns that a thread may hold."""
DENSE_VECTORS: Final = (1, 2, 4)
"""Vectors of channels that a thread of a dense link may hold; one of a depthwise link holds one."""
MOST_SUMS: Final = 64
"""Sums of a thread, at most: more would leave too few threads to a multiprocessor."""
CHANNELS: Final = (16, 32, 64, 128)
"""Output channels of a block, or all if that is no more than the last."""
CHUNKS: Final = (16, 32, 64, 128)
"""The same of its input channels per turn."""
THREADS: Final = (64, 128, 256)
"""Threads of a block whose last link is depthwise."""
MOST_THREADS: Final = 512
"""Threads of a block at most, as all of them wait at its barriers."""
MOST_ROWS: Final = 16
MOST_COLUMNS: Final = 32
LEAST_PIXELS: Final = 4
MOST_PIXELS: Final = 256
"""Of a block's tile of results; a single row, as that of all pixels of a pointwise layer, may have as many columns."""
AS_QUICK: Final = 1.03
"""Tilings that are predicted to take at most this times as long as the quickest count as quick as that: of these, the
one that moves the fewest bytes is chosen, as predictions are not that exact, and bytes are what others may need."""
SHAPES_KEPT: Final = 12
"""Shapes of blocks, of which all register blocks are tried."""
USUAL_RESIDENT_BLOCKS: Final = 4
"""Blocks of a multiprocessor whose waiting overlaps, for the choice of a link's register block by itself."""


def is_gpu_chain(links: Links) -> bool:
    """Whether one kernel with a `GpuTiling` computes `links`."""
    if any(link.depth is not None or not (is_dense(link) or is_depthwise(link)) for link in links):
        return False
    # Positions between links lie side by side, so that a link of one tap reads all of them.
    steps = all(link.stride == (1, 1) for link in links[1:] if 1 in link.kernel)
    return steps and all(is_depthwise(link) for link in links[1:-1])


@lru_cache(maxsize=4096)
def choose_gpu(
    links: Links, machine: GpuMachine, epilogue_costs: tuple[int, ...], operand_bytes: tuple[int, ...]
) -> Choice | None:
    """The tiling of least predicted time for `links`, a chain that `is_gpu_chain`; None if `machine` can hold none.

    Of several that are about as quick, it is the one that moves the fewest bytes. For the other arguments see
    `sepc.cost_model.gpu_latency.GpuProblem`.
    """
    problem = GpuProblem(links, machine, epilogue_costs, operand_bytes)
    times_us = {shape: problem.predict(tiling).time_us for shape, tiling in one_per_shape(problem).items()}
    kept = sorted(times_us, key=lambda shape: times_us[shape])[:SHAPES_KEPT]
    costs = {tiling: problem.predict(tiling) for shape in kept for tiling in _tilings_of(problem, shape)}
    limit_us = AS_QUICK * min((cost.time_us for cost in costs.values()), default=0.0)
    as_quick = [tiling for tiling, cost in costs.items() if cost.time_us <= limit_us]
    best = min(as_quick, key=lambda tiling: (problem.global_bytes(tiling), costs[tiling].time_us), default=None)
    return None if best is None else Choice(best, costs[best])


def gpu_tilings(problem: GpuProblem) -> Iterator[GpuTiling]:
    """The tilings of `problem` that are considered, all of which its machine can hold."""
    for shape in _shapes(problem):
        yield from _tilings_of(problem, shape)


def one_per_shape(problem: GpuProblem) -> dict[Shape, GpuTiling]:
    """Of the considered tilings one for each shape of blocks: that with the quickest register block by itself."""
    found = {shape: next(_tilings_of(problem, shape, only_quickest=True), None) for shape in _shapes(problem)}
    return {shape: tiling for shape, tiling in found.items() if tiling is not None}


class Shape(NamedTuple):
    """What of a tiling decides on the bytes that are moved."""

    rows: int
    columns: int
    channels: int
    chunk: int


def _shapes(problem: GpuProblem) -> Iterator[Shape]:
    """The shapes of blocks whose tiles fit shared memory."""
    last = problem.links[-1]
    chunks = _up_to(CHUNKS, last.in_channels) if is_dense(last) else [0]
    for (rows, columns), channels, chunk in product(_pixel_tiles(last), _up_to(CHANNELS, last.out_channels), chunks):
        if shared_bytes(problem.links, rows, columns, channels, chunk) <= problem.machine.shared_kib_per_block * 1024:
            yield Shape(rows, columns, channels, chunk)


def _tilings_of(problem: GpuProblem, shape: Shape, *, only_quickest: bool = False) -> Iterator[GpuTiling]:
    """The tilings of that shape that the machine can hold; or those with the quickest register block by itself."""
    links, shared = problem.links, shared_bytes(problem.links, *shape)
    *tiles, last_tile = link_tiles(links, *shape)
    index = len(tiles)
    for last in [_quickest(problem, index, last_tile)] if only_quickest else _blocks(links[-1], last_tile):
        for threads in _thread_counts(problem, last_tile.items(last)):
            held = (*(_quickest(problem, before, tile, threads) for before, tile in enumerate(tiles)), last)
            registers = registers_of(links, held)
            if problem.machine.resident_blocks(threads, registers, shared):
                yield GpuTiling(*shape[:3], threads, held, shape.chunk, shared, registers)


def _up_to(sizes: Sequence[int], channels: int) -> list[int]:
    """Those of `sizes` below `channels`, and all channels if they are not more than the last."""
    fitting = [size for size in sizes if size < channels]
    return [*fitting, channels] if channels <= sizes[-1] else fitting


def _pixel_tiles(last: Convolution) -> list[tuple[int, int]]:
    """Rows and columns of tiles of the results of `last`."""
    height, width = last.out_height, last.out_width
    if height == 1:
        return [(1, columns) for columns in _even_parts(width, MOST_PIXELS)]
    tiles = product(_even_parts(height, MOST_ROWS), _even_parts(width, MOST_COLUMNS))
    least = min(LEAST_PIXELS, height * width)
    # Narrow tiles read more of a halo than square ones, and take as much.
    return [
        (rows, columns)
        for rows, columns in tiles
        if least <= rows * columns <= MOST_PIXELS and (rows <= columns <= 4 * rows or columns == width)
    ]


def _even_parts(extent: int, most: int) -> list[int]:
    """Sizes up to `most` of even parts of `extent`, each about twice as large as the one before."""
    sizes = {ceil_div(extent, ceil_div(extent, 2**power)) for power in range(most.bit_length())}
    return sorted(size for size in sizes if size <= most)


def _blocks(conv: Convolution, tile: Tile) -> Iterator[GpuLink]:
    """The register blocks that a link may have for its tile."""
    vectors = ceil_div(tile.channels, VECTOR)
    for pixels in PIXELS:
        for count in DENSE_VECTORS if is_dense(conv) else (1,):
            if pixels <= tile.columns and count <= vectors and VECTOR * pixels * count <= MOST_SUMS:
                yield GpuLink(pixels, count)


def _thread_counts(problem: GpuProblem, items: int) -> list[int]:
    """Threads of a block whose last link has so many items: for a dense one one each, or more for links before it."""
    most = min(MOST_THREADS, problem.machine.threads_per_block)
    whole = problem.machine.warp_size * ceil_div(items, problem.machine.warp_size)
    if not is_dense(problem.links[-1]):
        return [count for count in THREADS if count == THREADS[0] or count <= min(whole, most)]
    more = (1,) if len(problem.links) == 1 else (1, 2, 4)
    return [whole * factor for factor in more if whole * factor <= (most if factor == 1 else THREADS[-1])]


def _quickest(problem: GpuProblem, index: int, tile: Tile, threads: int = 0) -> GpuLink:
    """The register block by which `threads` threads, or one per item, compute `tile` of a link in the fewest cycles."""
    found = problem.quickest.get((index, tile, threads))
    if found is None:
        warp = problem.machine.warp_size

        def cycles(link: GpuLink) -> float:
            items = tile.items(link)
            work = problem.item(index, link).spread(items, threads or items, warp)
            return max(*work[:-1], work.latency_cycles / USUAL_RESIDENT_BLOCKS)

        found = problem.quickest[index, tile, threads] = min(_blocks(problem.links[index], tile), key=cycles)
    return found
