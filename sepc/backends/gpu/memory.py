"""Where links of a chain read from and write to: global memory, and tiles in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tvm.tirx.script.builder import ir as T

from sepc.backends.gpu.boxes import Box, Item
from sepc.backends.stages.vector import Expr, Index, Operand, cast, lanes_of, ramp
from sepc.cost_model.gpu_tiling import Tile, pitch
from sepc.ir.convolution import Convolution


class Source(Protocol):
    """What a layer reads."""

    def load(self, item: Item, row: Index, column: Index, channel: Index, lanes: int) -> Expr:
        """`lanes` neighbouring channels from `channel` on, of the turn.

        Of what the item's first column reads in row `row` of the window and `column` columns further to the right.
        """


@dataclass(frozen=True)
class SharedTile:
    """A tile in shared memory, over (row, column, channel), from element `start` of `buffer` on."""

    buffer: Expr
    start: int
    tile: Tile

    def at(self, row: Index, column: Index, channel: Index) -> Index:
        """The element of that position in the tile."""
        return self.start + (row * self.tile.columns + column) * pitch(self.tile.channels) + channel

    def store(self, row: Index, column: Index, channel: Index, value: Expr) -> None:
        """Write the lanes of `value` to neighbouring channels, in the type of the tile."""
        value = cast(value, str(self.buffer.dtype))
        T.buffer_store(self.buffer, value, [ramp(self.at(row, column, channel), lanes_of(value))])


@dataclass(frozen=True)
class SharedSource:
    """The tile of what `conv` reads."""

    conv: Convolution
    tile: SharedTile

    def load(self, item: Item, row: Index, column: Index, channel: Index, lanes: int) -> Expr:
        """See `Source`."""
        (row_taps, column_taps), (down, across) = self.conv.kernel, self.conv.stride
        # What a kernel of one tap reads lies side by side.
        first_row = item.row * (1 if row_taps == 1 else down)
        first_column = item.column * (1 if column_taps == 1 else across)
        own = column // across if column_taps == 1 else column
        return self.tile.buffer[ramp(self.tile.at(first_row + row, first_column + own, channel), lanes)]


@dataclass(frozen=True)
class GlobalSource:
    """An image in global memory; what lies outside of it is zero.

    Attributes:
        operand: over (batch, row, column, channel). conv: what reads it. results: of `conv`. read: what these read.
        first: the first channel of the turn.
    """

    operand: Operand
    conv: Convolution
    results: Box
    read: Box
    first: Index = 0

    def load(self, item: Item, row: Index, column: Index, channel: Index, lanes: int) -> Expr:
        """See `Source`."""
        conv, results = self.conv, self.results
        in_row = results.rows.at(item.row) * conv.stride[0] - conv.padding[0] + row
        in_column = results.columns.at(item.column) * conv.stride[1] - conv.padding[1] + column * results.columns.step
        return self.read.load(self.operand, (in_row, in_column), self.first + channel, lanes)
