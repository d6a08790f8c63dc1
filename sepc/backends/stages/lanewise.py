"""The lanewise convolution stage: every vector lane has an input channel of its own.

Depthwise convolutions, with or without a channel multiplier, and grouped ones whose groups are narrower than a vector:

    out[n, y, x, o] = bias[o] + Σ_{q, r, c} in[n, y·s − p + r·d, x·s − p + c·d, (o // G)·Q + q] · W[o, q, r, c]

with Q input and G output channels per group. A block of `columns` outputs × `vectors` vectors stays in registers; an
input vector is loaded once per kernel row, or part of a long one, and used by every tap that reads it. Weights are
packed as [channel vector][row tap][q][column tap][lane].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.dense import RowTap, Sink, for_each_block, row_taps
from sepc.backends.stages.kernel import Frame, loop, tile_span, when
from sepc.backends.stages.sums import Sum
from sepc.backends.stages.vector import Expr, FloatArray, Index, Operand, line_elements, prefetch, ramp
from sepc.cost_model.tiling import LaneTiling, unrolled_taps
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import ColumnSegment, Convolution

# How many groups of channels ahead weights are fetched: on small maps a group takes less time than one access to DRAM.
PREFETCHED_GROUPS = 2


def pack_weights(weight: FloatArray, convolution: Convolution, lanes: int) -> FloatArray:
    """`weight` [O, I/groups, KH, KW] as the flat array that the kernel reads, for vectors of `lanes` channels."""
    pieces, start = [], 0
    for width in split_lanes(convolution.out_channels, lanes):
        pieces.append(weight[start : start + width].transpose(2, 1, 3, 0).ravel())
        start += width
    return np.ascontiguousarray(np.concatenate(pieces))


def for_each_channel_group(
    channels: int,
    lanes: int,
    vectors: int,
    groups: int,
    tile: Index,
    tiles: int,
    body: Callable[[Index, tuple[int, ...]], None],
) -> None:
    """Call `body(first channel, widths)` for the groups of `vectors` channel vectors of one tile.

    Full groups form a loop of `groups` per tile; the remaining channels, in narrower vectors, belong to the last tile.
    """
    width = lanes * vectors
    full = channels // width
    if full:
        with loop(tile_span(tile, groups, full, tiles)) as index:
            body((tile * groups + index) * width, (lanes,) * vectors)
    if channels % width:
        with when(tiles == 1 or tirx.EQ(tile, tiles - 1)):
            body(full * width, split_lanes(channels % width, lanes))


def channel_tiles(channels: int, lanes: int, vectors: int, groups: int) -> int:
    """Number of tiles that `for_each_channel_group` splits `channels` into."""
    return ceil_div(ceil_div(channels, lanes * vectors), groups)


@dataclass(frozen=True)
class LanewiseStage:
    """Emits a lanewise convolution. Attributes are those of `DenseStage`; `lanes` is the width of a full vector."""

    convolution: Convolution
    tiling: LaneTiling
    lanes: int
    source: Operand
    weight: Expr
    bias: Expr | None
    sink: Sink

    def emit(self, frame: Frame) -> None:
        """The whole convolution, shared by the threads of `frame`."""
        conv, tiling = self.convolution, self.tiling
        segments = conv.column_segments(tiling.columns)
        row_tiles = ceil_div(conv.out_height, tiling.rows)
        tiles = channel_tiles(conv.out_channels, self.lanes, tiling.group_vectors, tiling.groups)
        repeat = max(segment.repeat for segment in segments)
        blocks = tiling.blocks or max(1, repeat)
        column_tiles = max(1, ceil_div(repeat, blocks))
        with frame.tasks((*conv.leading, row_tiles, column_tiles, tiles)) as (*image, row_tile, column_tile, tile):

            def body(channel: Index, widths: tuple[int, ...]) -> None:
                self._prefetch_weights(channel, sum(widths))
                with loop(tile_span(row_tile, tiling.rows, conv.out_height, row_tiles)) as row:
                    block = _Block(self, widths, tuple(image), row_tile * tiling.rows + row, channel)
                    for_each_block(segments, blocks, column_tile, column_tiles, block.emit)

            for_each_channel_group(
                conv.out_channels, self.lanes, tiling.group_vectors, tiling.groups, tile, tiles, body
            )

    def _prefetch_weights(self, channel: Index, width: int) -> None:
        """Fetch the weights of `width` channels that are computed `PREFETCHED_GROUPS` groups after `channel`."""
        per_channel = self.convolution.taps * self.convolution.group_in
        base = (channel + PREFETCHED_GROUPS * width) * per_channel
        for line in range(0, width * per_channel, line_elements(self.weight)):
            prefetch(self.weight, base + line)

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """The output rows from `first` on and before `stop`, all channels and columns."""
        conv, vectors = self.convolution, self.tiling.group_vectors
        segments = conv.column_segments(self.tiling.columns)
        blocks = max(segment.repeat for segment in segments)

        def body(channel: Index, widths: tuple[int, ...]) -> None:
            with T.serial(first, stop) as row:
                for_each_block(segments, blocks, 0, 1, _Block(self, widths, (batch,), row, channel).emit)

        all_groups = ceil_div(conv.out_channels, self.lanes * vectors)
        for_each_channel_group(conv.out_channels, self.lanes, vectors, all_groups, 0, 1, body)


@dataclass(frozen=True)
class _Taps:
    """`count` taps of a row of the kernel, from `first` on, for input channel `member` of each lane's group."""

    row: RowTap
    member: Index
    first: Index
    count: int


@dataclass(frozen=True)
class _Block:
    """The innermost loops: `columns` outputs of one row times a few channel vectors, in registers."""

    stage: LanewiseStage
    widths: tuple[int, ...]
    image: tuple[Index, ...]
    row: Index
    channel: Index

    def emit(self, start: Index, segment: ColumnSegment) -> None:
        """Compute the columns of `segment` from `start` on: all channels, in the tiling's turns."""
        self._prefetch_next_row(start, segment)
        vectors, turns = self.stage.tiling.vectors, self.stage.tiling.turns
        if len(set(self.widths)) == 1 and len(self.widths) == vectors * turns:
            with loop(turns) as turn:
                self._part(turn * sum(self.widths[:vectors]), self.widths[:vectors]).compute(start, segment)
            return
        for first in range(0, len(self.widths), vectors):
            own = self.widths[first : first + vectors]
            self._part(sum(self.widths[:first]), own).compute(start, segment)

    def _part(self, channel: Index, widths: tuple[int, ...]) -> _Block:
        return replace(self, channel=self.channel + channel, widths=widths)

    def compute(self, start: Index, segment: ColumnSegment) -> None:
        """Compute the block in registers and hand each finished vector to the sink."""
        stage, conv = self.stage, self.stage.convolution
        offsets = [sum(self.widths[:j]) for j in range(len(self.widths))]
        sums = [[Sum(conv, lanes) for _ in range(segment.columns)] for lanes in self.widths]
        for row_of_sums, lanes, offset in zip(sums, self.widths, offsets, strict=True):
            initial = None if stage.bias is None else T.Bind(stage.bias[ramp(self.channel + offset, lanes)])
            for one in row_of_sums:
                one.start(initial)
        with row_taps(conv, self.image, self.row) as tap_row, loop(conv.group_in) as member:
            self._reduce_row(start, segment, sums, tap_row, member)
        for row_of_sums, offset in zip(sums, offsets, strict=True):
            for index, one in enumerate(row_of_sums):
                stage.sink((*self.image, self.row, start + index, self.channel + offset), one.value)

    def _reduce_row(
        self, start: Index, segment: ColumnSegment, sums: list[list[Sum]], tap_row: RowTap, member: Index
    ) -> None:
        """Add the products of one kernel row with input channel `member` of each group."""
        conv, channel = self.stage.convolution, self.channel
        long = conv.kernel[1] > conv.element.longest_sum

        def end_blocks() -> None:
            for one in chain.from_iterable(sums):
                one.end_block()

        def reduce(first: Index, count: int) -> None:
            taps, offset = _Taps(tap_row, member, first, count), 0
            for row_of_sums, lanes in zip(sums, self.widths, strict=True):
                self._reduce(start, segment, row_of_sums, channel + offset, lanes, taps)
                offset += lanes
            if long:
                end_blocks()

        self._for_each_part(segment, reduce)
        if not long:
            end_blocks()

    def _prefetch_next_row(self, start: Index, segment: ColumnSegment) -> None:
        """Fetch the input row that the next output row is the first to read, as far as this block's columns read it.

        A block reads few channels of each pixel, which hardware prefetchers do not foresee. Measured on a Zen 5 core,
        batch 16: 7²×960 252 µs without, 131 with; 56²×144 3.8 and 3.1 ms; nothing lost at batch 1. With stride 2,
        where there is four times as much to fetch, it was slower.
        """
        conv = self.stage.convolution
        if conv.stride != (1, 1) or conv.group_in * conv.group_out > 1 or conv.depth is not None:
            return
        row = self.row - conv.padding[0] + (conv.kernel[0] - 1) * conv.dilation[0] + 1
        for column in range(segment.columns):
            position = (*self.image, row, start + column, self.channel)
            self.stage.source.prefetch(position, sum(self.widths))

    def _for_each_part(self, segment: ColumnSegment, body: Callable[[Index, int], None]) -> None:
        """Call `body(first tap, count)` for the parts of a kernel row (at the border for all of it)."""
        taps = self.stage.convolution.kernel[1]
        size = unrolled_taps(taps) if segment.interior else taps
        with loop(taps // size) as part:
            body(part * size, size)
        if taps % size:
            body(taps // size * size, taps % size)

    def _reduce(
        self,
        start: Index,
        segment: ColumnSegment,
        sums: list[Sum],
        channel: Index,
        lanes: int,
        taps: _Taps,
    ) -> None:
        """Add the products of some taps."""
        stage, conv = self.stage, self.stage.convolution
        stride, dilation = conv.stride[1], conv.dilation[1]
        row = (taps.row.index * conv.group_in + taps.member) * conv.kernel[1] + taps.first
        base = channel * (conv.taps * conv.group_in) + row * lanes
        weights = [T.Bind(stage.weight[ramp(base + tap * lanes, lanes)]) for tap in range(taps.count)]
        users: dict[int, list[tuple[int, int]]] = {}
        for index in range(segment.columns):
            for tap in range(taps.count):
                # At the border all taps of the row are at hand: the first is number 0.
                if segment.interior or conv.column_valid(segment.start + index, tap):
                    users.setdefault(index * stride + tap * dilation, []).append((index, tap))
        for column in sorted(users):
            in_column = start * stride - conv.padding[1] + taps.first * dilation + column
            pixel = (*taps.row.image, taps.row.row, in_column)
            value = T.Bind(self._load(pixel, channel, lanes, taps.member))
            for index, tap in users[column]:
                sums[index].add(value, weights[tap])

    def _load(self, pixel: tuple[Index, ...], channel: Index, lanes: int, member: Index) -> Expr:
        """The input channels that `lanes` output channels from `channel` on read, as one vector."""
        conv, source = self.stage.convolution, self.stage.source
        if conv.group_in == conv.group_out == 1:
            return source.load((*pixel, channel), lanes)
        first = tirx.truncdiv(channel, conv.group_out) * conv.group_in + member
        groups = ceil_div(lanes, conv.group_out)
        lane_channels = [lane // conv.group_out * conv.group_in for lane in range(lanes)]
        if groups == 1:
            scalar = source.load((*pixel, first))
            return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)
        parts = [source.load((*pixel, first + group * conv.group_in)) for group in range(groups)]
        return tirx.Shuffle(
            [tirx.Broadcast(part, lanes) for part in parts],
            [tirx.const(lane_channels[lane] // conv.group_in * lanes + lane, "int32") for lane in range(lanes)],
        )
