"""What a block has of an image: rows and columns, of which some may lie outside, and which thread computes what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.gpu.kernel import BlockFrame
from sepc.backends.stages.kernel import coordinates, loop, when
from sepc.backends.stages.vector import Expr, Index, Operand, broadcast, constant, type_of
from sepc.cost_model.gpu_machine import VECTOR
from sepc.cost_model.gpu_tiling import GpuLink, Tile, read_extent, vector_groups
from sepc.errors import VerificationError
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import Convolution


@dataclass(frozen=True)
class Run:
    """Positions first, first + step, … along one axis of an image.

    Attributes:
        count: how many there are. first: the first one. step: between two of them.
        extent: of the axis. lowest, highest: what the first and the last one may be, in any block.
    """

    count: int
    first: Index
    extent: int
    lowest: int
    highest: int
    step: int = 1

    @staticmethod
    def of_tile(tile: Index, size: int, extent: int) -> Run:
        """The run of tile number `tile` of those of `size` that cover an axis of `extent`."""
        return Run(size, tile * size, extent, 0, ceil_div(extent, size) * size - 1)

    def at(self, index: Index) -> Index:
        """Position number `index`."""
        return self.first + index * self.step

    def inside(self, index: Index) -> list[Expr]:
        """What must hold for position number `index` to be one of the axis, as far as that is not known."""
        return self.contains(self.at(index))

    def contains(self, position: Index) -> list[Expr]:
        """What must hold for `position`, of the run, to be one of the axis, as far as that is not known."""
        return [
            *([position >= 0] if self.lowest < 0 else []),
            *([position < self.extent] if self.highest >= self.extent else []),
        ]

    def nearest(self, position: Index) -> Index:
        """The position next to `position` that is both of the run and of the axis."""
        last = T.Bind(tirx.min(self.extent - 1, self.at(self.count - 1)))
        position = tirx.min(position, last)
        return tirx.max(0, position) if self.lowest < 0 else position

    def read(self, taps: int, stride: int, padding: int, dilation: int, extent: int) -> Run:
        """The run, of an axis of `extent`, that a window of so many taps reads for these positions."""
        if self.step != 1 and taps != 1:
            raise VerificationError("A strided layer of one tap does not follow a window in one kernel")
        first = T.Bind(self.first * stride - padding)
        lowest = self.lowest * stride - padding
        highest = self.highest * stride - padding + (taps - 1) * dilation
        step = self.step * stride if taps == 1 else 1
        return Run(read_extent(self.count, taps, stride, dilation), first, extent, lowest, highest, step)


@dataclass(frozen=True)
class Box:
    """Rows and columns of one image, and its number."""

    image: Index
    rows: Run
    columns: Run

    def read_by(self, conv: Convolution) -> Box:
        """What `conv` reads for these positions."""
        axes = zip(conv.kernel, conv.stride, conv.padding, conv.dilation, (conv.in_height, conv.in_width), strict=True)
        rows, columns = (run.read(*axis) for run, axis in zip((self.rows, self.columns), axes, strict=True))
        return Box(self.image, rows, columns)

    def tile(self, channels: int) -> Tile:
        """Its extents, with so many channels."""
        return Tile(self.rows.count, self.columns.count, channels)

    def inside(self, row: Index, column: Index) -> Expr | bool:
        """Whether that position of it is one of the image."""
        return all_of([*self.rows.inside(row), *self.columns.inside(column)])

    def load(self, operand: Operand, place: tuple[Index, Index], channel: Index, lanes: int) -> Expr:
        """What `operand` has at `place`, a row and a column of the image; 0 outside of that.

        Nothing is read that is not in the box: in place of what is outside of the image, the nearest that is inside.
        """
        runs = tuple(zip(place, (self.rows, self.columns), strict=True))
        nearest = [run.nearest(position) for position, run in runs]
        value = operand.load((self.image, *nearest, channel), lanes)
        condition = all_of([one for position, run in runs for one in run.contains(position)])
        if isinstance(condition, bool):
            return value
        return tirx.Select(broadcast(condition, lanes), value, constant(0, lanes, type_of(value)))


@dataclass(frozen=True)
class Channels:
    """A run of channels that a block computes at a time.

    Attributes:
        first: the first one. count: how many there are at most. limit: how many there are.
        tail: how many of them are no whole vector, in the last run of all.
    """

    first: Index
    count: int
    limit: Index
    tail: int

    @staticmethod
    def of_run(first: Index, count: int) -> Channels:
        """The run of `count` channels from `first` on."""
        return Channels(first, count, count, count % VECTOR)

    @staticmethod
    def of_tile(tile: Index, size: int, total: int) -> Channels:
        """The run of tile number `tile` of those of `size` that cover `total` channels."""
        first = tile * size
        limit = size if total % size == 0 else T.Bind(tirx.min(size, total - first))
        return Channels(first, size, limit, (size if total % size == 0 else total) % VECTOR)

    def for_each_piece(self, channel: Index, covered: int, body: Callable[[int, int], None]) -> None:
        """Call `body(offset, lanes)` for what there is of the vector at `channel` of the run, in powers of two.

        `covered`: how many channels the vectors of all threads have.
        """
        if isinstance(self.limit, int) and covered == self.limit:
            body(0, VECTOR)
            return
        is_whole = channel + VECTOR <= self.limit
        if is_whole is not False:
            with when(is_whole):
                body(0, VECTOR)
        if self.tail and is_whole is not True:
            with when(True if is_whole is False else _equal(channel, self.limit - self.tail)):
                offset = 0
                for lanes in split_lanes(self.tail, VECTOR):
                    body(offset, lanes)
                    offset += lanes


@dataclass(frozen=True)
class Item:
    """What a thread computes at a time: `link.pixels` columns from `column` on, of `row`, and some channel vectors.

    Attributes:
        row, column: counted within the tile. group, groups: which vectors, out of how many groups.
    """

    link: GpuLink
    row: Index
    column: Index
    group: Index
    groups: int

    def channel(self, vector: int) -> Index:
        """The first channel, within the tile, of vector number `vector`."""
        return (self.group + vector * self.groups) * VECTOR

    @property
    def covered(self) -> int:
        """Channels that the vectors of all groups have."""
        return self.groups * self.link.vectors * VECTOR


def items_of(tile: Tile, link: GpuLink) -> tuple[int, int, int]:
    """How many items there are along rows, columns, and channels."""
    return tile.rows, ceil_div(tile.columns, link.pixels), vector_groups(tile.channels, link)


@contextmanager
def for_each_item(frame: BlockFrame, tile: Tile, link: GpuLink) -> Iterator[Item]:
    """The items of a tile that belong to a thread: numbers thread, thread + threads and so on."""
    counts = items_of(tile, link)
    turns = ceil_div(tile.items(link), frame.threads)
    with loop(turns) as turn:
        number = frame.thread if turns == 1 else T.Bind(turn * frame.threads + frame.thread)
        with when(True if tile.items(link) == turns * frame.threads else number < tile.items(link)):
            row, column, group = coordinates(number, counts)
            yield Item(link, row, column * link.pixels, group, counts[2])


def _equal(left: Index, right: Index) -> Expr:
    return tirx.EQ(tirx.const(left, "int32") if isinstance(left, int) else left, right)


def all_of(conditions: list[Expr]) -> Expr | bool:
    """Whether all of the conditions hold; known where there are none."""
    result: Expr | bool = True
    for condition in conditions:
        result = condition if result is True else tirx.And(result, condition)
    return result
