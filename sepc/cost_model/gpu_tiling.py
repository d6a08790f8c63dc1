"""Tilings of convolutions, and of chains of them, for GPUs: what a thread block computes, and what it keeps where.

A block computes `rows` × `columns` × `channels` of the last link's result, for one image. The grid is images × row
tiles × column tiles × channel tiles, the latter innermost, so that blocks that run at the same time read the same
input. All tiles of an axis have one size but the last, which may be smaller.

A link is dense (one group: pointwise, or with a window) or depthwise (as many groups as channels, in and out). A chain
is a dense or depthwise link, depthwise links, and a dense or depthwise link; each is computed as follows.

- A dense last link keeps the sums of its results in registers while the block goes over its input channels, `chunk` at
  a time. In each turn the links before it compute that many channels of their tiles in shared memory, between barriers.
  A single dense layer copies that many channels of its input there instead.
- If the last link is depthwise there is one turn: of the channels that the block computes.
- A tile in shared memory is [rows][columns][`pitch` of the channels of a turn], and holds every position that the next
  link's tile reads (`read_extent`), also those outside of the image, which are zero. The first link reads global
  memory.
- Weights are read from global memory, through the read-only cache.

Work within a block. The tile of a link is cut into items of one row × `GpuLink.pixels` neighbouring columns ×
`GpuLink.vectors` vectors of `VECTOR` channels. Of G groups of vectors, group g has the vectors g, g + G, g + 2G, …, so
that groups next to each other are next to each other in memory. Items are numbered by (row, block of columns, group),
the last fastest. Thread t takes items t, t + threads, …; of a dense last link it has one at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sepc.cost_model.gpu_machine import VECTOR
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution


@dataclass(frozen=True)
class GpuLink:
    """What one thread holds in registers of a link's results.

    Attributes:
        pixels: neighbouring output columns.
        vectors: vectors of `VECTOR` channels.
    """

    pixels: int
    vectors: int

    def __str__(self) -> str:
        return f"{self.pixels}×{self.vectors} vectors"


@dataclass(frozen=True)
class GpuTiling:
    """Blocking of a convolution, or of a chain of them, for a GPU: see the head of this module.

    Attributes:
        rows, columns, channels: of the last link's result that a block computes. Channels are whole vectors, or all.
        threads: of a block; whole warps.
        links: the register block of each link.
        chunk: input channels of the dense last link per turn, whole vectors, or all; 0 if the last link is depthwise.
        shared_bytes: shared memory of a block.
        registers: 32-bit registers of a thread, at most.
    """

    rows: int
    columns: int
    channels: int
    threads: int
    links: tuple[GpuLink, ...]
    chunk: int
    shared_bytes: int
    registers: int

    def __str__(self) -> str:
        turns = f" in turns of {self.chunk} input channels" if self.chunk else ""
        shared = f", {self.shared_bytes / 1024:.1f} KiB shared" if self.shared_bytes else ""
        held = ", ".join(map(str, self.links))
        return (
            f"block {self.rows}×{self.columns} pixels × {self.channels} channels{turns}, "
            f"{self.threads} threads of registers {held}{shared}"
        )


class Tile(NamedTuple):
    """Extents of a value that a block has of an image at a time."""

    rows: int
    columns: int
    channels: int

    def items(self, link: GpuLink) -> int:
        """Items of `link` that make it up."""
        return self.rows * ceil_div(self.columns, link.pixels) * vector_groups(self.channels, link)


def pitch(channels: int) -> int:
    """Elements from one position of a tile in shared memory to the next: whole vectors, and one for the banks.

    Without that, threads of a warp that read columns next to each other would mostly find them in the same banks.
    """
    return VECTOR * (ceil_div(channels, VECTOR) + 1)


def vector_groups(channels: int, link: GpuLink) -> int:
    """Groups of `link.vectors` vectors that hold so many channels."""
    return ceil_div(ceil_div(channels, VECTOR), link.vectors)


def is_depthwise(conv: Convolution) -> bool:
    """Whether every channel of `conv` reads one of its own."""
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


def is_dense(conv: Convolution) -> bool:
    """Whether every output channel of `conv` reads all input channels."""
    return conv.groups == 1


def read_extent(outputs: int, kernel: int, stride: int, dilation: int) -> int:
    """Positions along one axis of the tile that `outputs` neighbouring outputs read.

    All between the first and the last; a kernel of one tap reads one position per output, which then lie side by side.
    """
    return outputs if kernel == 1 else (outputs - 1) * stride + (kernel - 1) * dilation + 1


def read_tile(conv: Convolution, rows: int, columns: int, channels: int) -> Tile:
    """The tile of `channels` input channels that `rows` × `columns` outputs of `conv` read."""
    sizes = zip((rows, columns), conv.kernel, conv.stride, conv.dilation, strict=True)
    in_rows, in_columns = (read_extent(*size) for size in sizes)
    return Tile(in_rows, in_columns, channels)


def link_tiles(links: Sequence[Convolution], rows: int, columns: int, channels: int, chunk: int) -> tuple[Tile, ...]:
    """What a block has of each link's result in a turn, for the block and the chunk of a `GpuTiling`."""
    tiles = [Tile(rows, columns, channels)]
    turn = chunk or channels
    for link in reversed(links[1:]):
        tiles.insert(0, read_tile(link, tiles[0].rows, tiles[0].columns, turn))
    return tuple(tiles)


def shared_tiles(links: Sequence[Convolution], rows: int, columns: int, channels: int, chunk: int) -> tuple[Tile, ...]:
    """What lies in shared memory: the results of all links but the last, or the input of a single dense layer."""
    if len(links) == 1:
        return (read_tile(links[0], rows, columns, chunk),) if is_dense(links[0]) else ()
    return link_tiles(links, rows, columns, channels, chunk)[:-1]


def shared_bytes(links: Sequence[Convolution], rows: int, columns: int, channels: int, chunk: int) -> int:
    """Bytes of shared memory that a block needs: all tiles, one after the other."""
    tiles = shared_tiles(links, rows, columns, channels, chunk)
    return links[0].element.size_bytes * sum(tile.rows * tile.columns * pitch(tile.channels) for tile in tiles)
