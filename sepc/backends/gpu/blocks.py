"""What a thread block computes: a tile of the last link's result, after what it needs of the links before it.

A dense last link keeps its sums in registers while the block goes over its input channels in turns. Between two links
lies a tile in shared memory; a single dense layer copies its input there. `sepc.cost_model.gpu_tiling` tells how work
is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch import fx
from tvm.tirx.script.builder import ir as T

from sepc.backends.gpu.boxes import Box, Channels, Item, Run, for_each_item, items_of
from sepc.backends.gpu.kernel import BlockFrame, barrier
from sepc.backends.gpu.links import Constants, LinkEmitter, Sums
from sepc.backends.gpu.memory import GlobalSource, SharedSource, SharedTile, Source
from sepc.backends.sink import Sink
from sepc.backends.stages.elementwise import Expression
from sepc.backends.stages.kernel import coordinates, when
from sepc.backends.stages.vector import Expr, Index, Operand, cast, constant, lanes_of, type_of
from sepc.cost_model.gpu_tiling import GpuLink, GpuTiling, Tile, is_dense, pitch, shared_bytes, shared_tiles
from sepc.ir import ops
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution

STATIC_SHARED_BYTES: Final = 48 << 10
"""Shared memory that a kernel may declare; what takes more is asked for at the launch."""


def dynamic_shared_bytes(convs: Sequence[Convolution], tiling: GpuTiling) -> int:
    """Shared memory that is asked for at the launch."""
    size = shared_bytes(convs, tiling.rows, tiling.columns, tiling.channels, tiling.chunk)
    return size if size > STATIC_SHARED_BYTES else 0


def grid(conv: Convolution, tiling: GpuTiling) -> tuple[int, int, int, int]:
    """How many blocks there are: images, tiles of rows, of columns, and of channels of the last link."""
    return (
        conv.batch,
        ceil_div(conv.out_height, tiling.rows),
        ceil_div(conv.out_width, tiling.columns),
        ceil_div(conv.out_channels, tiling.channels),
    )


@dataclass(frozen=True)
class BlockLink:
    """A link as a block sees it.

    Attributes:
        conv: the layer. constants: its weights. anchor: its node. expression: what follows it.
    """

    conv: Convolution
    constants: Constants
    anchor: fx.Node
    expression: Expression

    def result(self, position: Sequence[Index], value: Expr) -> Expr:
        """What becomes of a finished vector at `position`."""
        given = {self.anchor: cast(value, ops.element(self.anchor).name)}
        return self.expression(given, position, lanes_of(value))


@dataclass(frozen=True)
class BlockStage:
    """Emits a block.

    Attributes:
        frame: the kernel's. links: the chain. tiling: how it is blocked. read: the first link's input.
        sink: what becomes of the last link's results.
    """

    frame: BlockFrame
    links: Sequence[BlockLink]
    tiling: GpuTiling
    read: Operand
    sink: Sink

    @property
    def _convolutions(self) -> list[Convolution]:
        return [link.conv for link in self.links]

    def emit(self) -> None:
        """All of it."""
        last, tiling = self.links[-1].conv, self.tiling
        image, row, column, channel = coordinates(self.frame.block, grid(last, tiling))
        rows = Run.of_tile(row, tiling.rows, last.out_height)
        columns = Run.of_tile(column, tiling.columns, last.out_width)
        boxes = [Box(image, rows, columns)]
        for conv in reversed(self._convolutions):
            boxes.insert(0, boxes[0].read_by(conv))
        channels = Channels.of_tile(channel, tiling.channels, last.out_channels)
        _Turns(self, tuple(boxes), channels, self._tiles()).emit()

    def _tiles(self) -> list[SharedTile]:
        """The tiles in shared memory, which this allocates."""
        shape = (self.tiling.rows, self.tiling.columns, self.tiling.channels, self.tiling.chunk)
        size = shared_bytes(self._convolutions, *shape)
        if not size:
            return []
        element = self.links[0].conv.element
        scope = "shared.dyn" if dynamic_shared_bytes(self._convolutions, self.tiling) else "shared"
        buffer = T.alloc_buffer((size // element.size_bytes,), element.name, scope=scope)
        tiles, start = list[SharedTile](), 0
        for tile in shared_tiles(self._convolutions, *shape):
            tiles.append(SharedTile(buffer, start, tile))
            start += tile.rows * tile.columns * pitch(tile.channels)
        return tiles


@dataclass(frozen=True)
class _Turns:
    """The turns of a block.

    Attributes:
        boxes: what the block reads, and what it has of each link's result. channels: of the result.
        tiles: those in shared memory.
    """

    block: BlockStage
    boxes: tuple[Box, ...]
    channels: Channels
    tiles: Sequence[SharedTile]

    def emit(self) -> None:
        """All turns, and the results."""
        last = self.block.links[-1].conv
        tile = self.boxes[-1].tile(self.channels.count)
        link = self.block.tiling.links[-1]
        if is_dense(last):
            self._dense_last(last, tile, link)
            return
        self._before(self.channels)
        with for_each_item(self.block.frame, tile, link) as item:
            sums = Sums.of(link)
            sums.start(item, self.channels, self._constants)
            self._last(self.channels).add(sums, item, self.channels, self.channels)
            self._finish(sums, item)

    def _dense_last(self, last: Convolution, tile: Tile, link: GpuLink) -> None:
        frame, chunk = self.block.frame, min(self.block.tiling.chunk, last.in_channels)
        counts = items_of(tile, link)
        busy = True if tile.items(link) == frame.threads else frame.thread < tile.items(link)
        row, column, group = coordinates(frame.thread, counts)
        item = Item(link, row, column * link.pixels, group, counts[2])
        sums = Sums.of(link)
        with when(busy):
            sums.start(item, self.channels, self._constants)

        def turn(inputs: Channels, *, more: bool) -> None:
            self._before(inputs)
            with when(busy):
                self._last(inputs).add(sums, item, self.channels, inputs)
            if more:
                barrier()

        full, rest = divmod(last.in_channels, chunk)
        if full == 1:
            turn(Channels.of_run(0, chunk), more=rest > 0)
        else:
            with T.serial(full) as index:
                turn(Channels.of_run(index * chunk, chunk), more=True)
        if rest:
            turn(Channels.of_run(full * chunk, rest), more=False)
        with when(busy):
            self._finish(sums, item)

    @cached_property
    def _constants(self) -> Constants:
        return self.block.links[-1].constants

    def _last(self, inputs: Channels) -> LinkEmitter:
        """The last link, in the turn of `inputs`."""
        index = len(self.block.links) - 1
        return LinkEmitter(
            self.block.links[index].conv, self.block.tiling.links[index], self._constants, self._source(index, inputs)
        )

    def _source(self, index: int, inputs: Channels) -> Source:
        """What link number `index` reads in the turn of `inputs`."""
        conv = self.block.links[index].conv
        if index > 0:
            return SharedSource(conv, self.tiles[index - 1])
        if len(self.block.links) == 1 and is_dense(conv):
            return SharedSource(conv, self.tiles[0])
        first = 0 if is_dense(conv) else inputs.first
        return GlobalSource(self.block.read, conv, self.boxes[1], self.boxes[0], first)

    # ---- what a turn needs before the last link

    def _before(self, inputs: Channels) -> None:
        """The values that the last link reads in the turn of `inputs`, in shared memory."""
        links = self.block.links
        if len(links) == 1:
            if is_dense(links[0].conv):
                self._copy(inputs)
                barrier()
            return
        for index in range(len(links) - 1):
            self._between(index, inputs)
            barrier()

    def _copy(self, inputs: Channels) -> None:
        """The input of a single dense layer."""
        block, box, tile = self.block, self.boxes[0], self.tiles[0]
        with for_each_item(block.frame, box.tile(inputs.count), GpuLink(1, 1)) as item:
            place = box.rows.at(item.row), box.columns.at(item.column)

            def piece(offset: int, lanes: int) -> None:
                channel = item.channel(0) + offset
                value = T.Bind(box.load(block.read, place, inputs.first + channel, lanes))
                tile.store(item.row, item.column, channel, value)

            inputs.for_each_piece(item.channel(0), item.covered, piece)

    def _between(self, index: int, channels: Channels) -> None:
        """The `channels` of the result of link number `index`."""
        link, shape = self.block.links[index], self.block.tiling.links[index]
        inputs = Channels.of_run(0, link.conv.in_channels) if is_dense(link.conv) else channels
        emitter = LinkEmitter(link.conv, shape, link.constants, self._source(index, channels))
        box, tile = self.boxes[index + 1], self.tiles[index]
        with for_each_item(self.block.frame, box.tile(channels.count), shape) as item:
            sums = Sums.of(shape)
            sums.start(item, channels, link.constants)
            emitter.add(sums, item, channels, inputs)

            def finish(pixel: int, vector: int, offset: int, value: Expr) -> None:
                column, channel = item.column + pixel, item.channel(vector) + offset
                with when(_is_of(box, shape, column)):
                    _store(link, box, (item.row, column), channels.first + channel, tile, channel, value)

            sums.finish(item, channels, finish)

    def _finish(self, sums: Sums, item: Item) -> None:
        """Hand an item's results to the sink."""
        box, link = self.boxes[-1], self.block.tiling.links[-1]

        def finish(pixel: int, vector: int, offset: int, value: Expr) -> None:
            column = item.column + pixel
            channel = self.channels.first + item.channel(vector) + offset
            position = (box.image, box.rows.at(item.row), box.columns.at(column), channel)
            with when(_is_of(box, link, column)), when(box.inside(item.row, column)):
                self.block.sink.finish(position, value)

        sums.finish(item, self.channels, finish)


def _is_of(box: Box, link: GpuLink, column: Index) -> Expr | bool:
    """Whether a column of an item is one of the tile: its last item may have more."""
    return True if box.columns.count % link.pixels == 0 else column < box.columns.count


def _store(
    link: BlockLink,
    box: Box,
    place: tuple[Index, Index],
    channel: Index,
    tile: SharedTile,
    own: Index,
    value: Expr,
) -> None:
    """Store a finished vector of `channel` to channel `own` of a tile: 0 where the place is outside of the image."""
    row, column = place
    position = (box.image, box.rows.at(row), box.columns.at(column), channel)
    inside = box.inside(row, column)
    if isinstance(inside, bool):
        tile.store(row, column, own, link.result(position, value))
        return
    with T.If(inside):
        with T.Then():
            tile.store(row, column, own, link.result(position, value))
        with T.Else():
            tile.store(row, column, own, constant(0, lanes_of(value), type_of(value)))
