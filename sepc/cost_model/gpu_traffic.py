"""Elements that the blocks of a kernel load from and store to global memory, by walking its links backwards.

A block's tile of results reads positions of the value before it along rows, the same along columns, and channels; these
are computed from others of the value before, and so on to the input. Rows, columns and channels do not depend on each
other, so that what all blocks touch together is a product of sums over tiles of one axis. Of the input,

    compulsory   is what any block reads, once,
    halo         is what neighbouring tiles of rows and columns read in common, over and over,
    re-read      is what blocks of other output channels read again, as a dense link needs all of its input's channels.

Weights are compulsory once, and re-read by every further block that needs them. Loads of one block that find their data
in its registers, in shared memory or in the first-level cache do not count here: see `sepc.cost_model.gpu_latency`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from sepc.cost_model.gpu_tiling import GpuTiling, is_dense
from sepc.cost_model.loops import Footprint
from sepc.cost_model.traffic import Nest
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution

Links = tuple[Convolution, ...]


class Window(NamedTuple):
    """A link along one axis: what an output position reads."""

    outputs: int
    inputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int


@dataclass(frozen=True)
class AxisWalk:
    """What the tiles of one axis touch.

    Attributes:
        tiles: how many there are.
        read: positions of the input, summed over tiles. distinct: of all tiles together, each counted once.
        computed: positions of each link's result that are computed, summed over tiles.
    """

    tiles: int
    read: int
    distinct: int
    computed: tuple[int, ...]


@dataclass(frozen=True)
class GlobalElements:
    """What the blocks of a kernel load and store, in elements; each block counts what it touches once."""

    compulsory: int
    halo: int
    reread: int
    weights: int
    weights_reread: int
    results: int

    @property
    def loads(self) -> int:
        """All that is loaded: of the input, and of weights."""
        return self.compulsory + self.halo + self.reread + self.weights + self.weights_reread

    @property
    def total(self) -> int:
        """All that is loaded and stored."""
        return self.loads + self.results


def windows(links: Sequence[Convolution], axis: int) -> tuple[Window, ...]:
    """The links along rows (0) or columns (1)."""
    return tuple(
        Window(
            (link.out_height, link.out_width)[axis],
            (link.in_height, link.in_width)[axis],
            link.kernel[axis],
            link.stride[axis],
            link.padding[axis],
            link.dilation[axis],
        )
        for link in links
    )


@lru_cache(maxsize=65536)
def walk_axis(chain: tuple[Window, ...], size: int, staged: bool) -> AxisWalk:
    """What tiles of `size` results touch; `staged`: whether whole tiles of the input are copied."""
    last = chain[-1]
    if len(chain) == 1 and last.kernel == 1:
        count = len(_inside(last, range(last.outputs)))
        return AxisWalk(ceil_div(last.outputs, size), count, count, (last.outputs,))
    computed = [0] * len(chain)
    read, distinct = 0, set[int]()
    for begin in range(0, last.outputs, size):
        # Of a tile that reaches past the results, as of one that reaches past a link's input, all is read that exists.
        tile = range(begin, begin + size)
        for index in reversed(range(len(chain))):
            computed[index] += len(_within(tile, chain[index].outputs))
            if index:
                tile = _span(chain[index], tile)
        touched = _touched(chain[0], tile, staged)
        read += len(touched)
        distinct.update(touched)
    return AxisWalk(ceil_div(last.outputs, size), read, len(distinct), tuple(computed))


def _span(link: Window, tile: range) -> range:
    """The positions, some perhaps outside of the input, between the first and the last that `tile` reads."""
    first = tile.start * link.stride - link.padding
    return range(first, (tile.stop - 1) * link.stride - link.padding + (link.kernel - 1) * link.dilation + 1)


def _within(tile: range, extent: int) -> range:
    """Those of neighbouring positions that are inside of an axis."""
    return range(max(0, tile.start), max(0, min(tile.stop, extent)))


def _inside(link: Window, tile: range) -> range:
    """The positions inside of the input that a window of one tap reads for those of `tile` that are results."""
    first = max(0, tile.start, ceil_div(link.padding, link.stride))
    end = min(tile.stop, ceil_div(link.inputs + link.padding, link.stride))
    return range(first * link.stride - link.padding, max(first, end) * link.stride - link.padding, link.stride)


def _touched(link: Window, tile: range, staged: bool) -> range | set[int]:
    """The positions of the input that `tile` reads, or that are copied for it."""
    if link.kernel == 1:
        return _inside(link, tile)
    if staged or (link.dilation == 1 and link.stride <= link.kernel):
        return _within(_span(link, tile), link.inputs)
    taps = range(0, link.kernel * link.dilation, link.dilation)
    positions = {output * link.stride - link.padding + tap for output in tile for tap in taps}
    return {position for position in positions if 0 <= position < link.inputs}


@dataclass(frozen=True)
class Walk:
    """The walk through the links of a kernel under a tiling: along rows, along columns, and over channels.

    Attributes:
        links: the links. rows, columns: the two axes. channel_tiles: tiles of output channels.
        needs_all: per link, whether each block computes all of its channels rather than those of its own tile.
    """

    links: Links
    rows: AxisWalk
    columns: AxisWalk
    channel_tiles: int
    needs_all: tuple[bool, ...]

    @property
    def images(self) -> int:
        """Images."""
        return self.links[-1].batch

    @property
    def pixel_tiles(self) -> int:
        """Tiles of rows and columns, over all images."""
        return self.images * self.rows.tiles * self.columns.tiles

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.pixel_tiles * self.channel_tiles

    @property
    def reads_all(self) -> bool:
        """Whether each block reads all channels of the input."""
        return self.needs_all[0] or is_dense(self.links[0])

    def repeats(self, index: int) -> int:
        """How many tiles of channels compute the same channels of link number `index`."""
        return self.channel_tiles if self.needs_all[index] else 1

    def computed(self, index: int) -> int:
        """Elements of the result of link number `index` that are computed, over all blocks."""
        positions = self.images * self.rows.computed[index] * self.columns.computed[index]
        return positions * self.links[index].out_channels * self.repeats(index)

    @cached_property
    def elements(self) -> GlobalElements:
        """What all blocks load and store."""
        first, last = self.links[0], self.links[-1]
        compulsory = self.images * self.rows.distinct * self.columns.distinct * first.in_channels
        once = self.images * self.rows.read * self.columns.read * first.in_channels
        weights = sum(map(weights_of, self.links))
        fetched = sum(weights_of(link) * self.repeats(index) for index, link in enumerate(self.links))
        return GlobalElements(
            compulsory=compulsory,
            halo=once - compulsory,
            reread=once * ((self.channel_tiles if self.reads_all else 1) - 1),
            weights=weights,
            weights_reread=self.pixel_tiles * fetched - weights,
            results=last.pixels * last.out_channels,
        )

    def nest(self, operand_bytes: float = 0.0) -> Nest:
        """The grid as loops over images, tiles of rows, of columns and of channels, with what each of them touches."""
        size, rows, columns = self.links[0].element.size_bytes, self.rows, self.columns
        first, last, parts = self.links[0], self.links[-1], self.channel_tiles
        strip, block = rows.read / rows.tiles, columns.read / columns.tiles
        image = rows.distinct * columns.distinct
        pixels = (self.images * image, image, strip * columns.distinct, strip * block)
        activations = [size * first.in_channels * count for count in pixels]
        activations.append(activations[-1] / (1 if self.reads_all else parts))
        weights = size * sum(map(weights_of, self.links))
        own = size * sum(weights_of(link) * self.repeats(index) for index, link in enumerate(self.links)) / parts
        trips = (self.images, rows.tiles, columns.tiles, parts)
        results, shares = [float(size * last.pixels * last.out_channels)], [1.0]
        for count in trips:
            results.append(results[-1] / count)
            shares.append(shares[-1] / count)
        footprints = tuple(
            Footprint(read + share * operand_bytes, weight, written)
            for read, share, weight, written in zip(activations, shares, [weights] * 4 + [own], results, strict=True)
        )
        return Nest(trips, footprints, self.blocks, 1.0)


def walk(links: Links, rows: int, columns: int, channels: int) -> Walk:
    """The walk through `links` for blocks of `rows` × `columns` × `channels` results."""
    staged = len(links) == 1 and is_dense(links[0])
    along_rows, along_columns = (
        walk_axis(windows(links, axis), size, staged) for axis, size in enumerate((rows, columns))
    )
    needs_all = [any(is_dense(later) for later in links[index + 1 :]) for index in range(len(links))]
    return Walk(links, along_rows, along_columns, ceil_div(links[-1].out_channels, channels), tuple(needs_all))


def weights_of(conv: Convolution) -> int:
    """Weights of a link, and a bias per output channel."""
    return conv.out_channels * (conv.group_in * conv.taps + 1)


def global_elements(links: Links, tiling: GpuTiling) -> GlobalElements:
    """What the kernel of `links` under `tiling` loads and stores, in elements."""
    return walk(links, tiling.rows, tiling.columns, tiling.channels).elements
