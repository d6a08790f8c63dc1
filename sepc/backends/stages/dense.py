"""The dense convolution stage: one input value times a vector of output channels.

    out[n, y, x, o] = bias[o] + Σ_{i, r, c} in[n, y·s − p + r·d, x·s − p + c·d, i] · W[o, i, r, c]

A block of `columns × panel` outputs stays in registers over the whole reduction. Pointwise convolutions and linear
layers are the case of one tap. Weights are packed into the order of reading: [panel][row tap][column tap][input
channel][panel lane]. Rows outside the input are left out by the bounds of the tap loop; columns are known while code is
generated, so that border blocks simply do not contain the taps that fall outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.fetching import AheadShare, Fetched, PixelShare, Visit, WeightShare
from sepc.backends.stages.kernel import Frame, count_below, loop, tile_span, when
from sepc.backends.stages.registers import Registers
from sepc.backends.stages.vector import (
    Expr,
    FloatArray,
    Index,
    Operand,
    ramp,
)
from sepc.cost_model.tiling import DenseTiling
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import ColumnSegment, Convolution

Position = tuple[Index, ...]  # batch, plane (of a stage with depth), row, column, first channel
Sink = Callable[[Position, Expr], None]  # takes a vector of finished channels at a position


@dataclass(frozen=True)
class Panels:
    """How the output channels of one group fall into panels: `count` full ones and possibly a narrower `tail`."""

    widths: tuple[int, ...]
    count: int
    tail: tuple[int, ...]

    @staticmethod
    def of(convolution: Convolution, panel: tuple[int, ...]) -> Panels:
        """The panels of `convolution` for vector widths `panel`."""
        width, lanes = sum(panel), max(panel)
        return Panels(panel, convolution.group_out // width, split_lanes(convolution.group_out % width, lanes))

    @property
    def total(self) -> int:
        """Panels, the tail included."""
        return self.count + bool(self.tail)


def pack_weights(weight: FloatArray, convolution: Convolution, panel: tuple[int, ...]) -> FloatArray:
    """`weight` [O, I/groups, KH, KW] as the flat array that the kernel reads."""
    panels = Panels.of(convolution, panel)
    grouped = weight.reshape(convolution.groups, convolution.group_out, *weight.shape[1:])
    # [groups, KH, KW, I/groups, O/groups]
    reordered = grouped.transpose(0, 3, 4, 2, 1)
    width, pieces = sum(panel), []
    for group in reordered:
        pieces += [group[..., index * width : (index + 1) * width].ravel() for index in range(panels.total)]
    return np.ascontiguousarray(np.concatenate(pieces))


@dataclass(frozen=True)
class RowTap:
    """A row of the kernel, counted over all its planes, and what it reads: an input row of an image."""

    index: Index
    image: tuple[Index, ...]
    row: Index


@contextmanager
def row_taps(conv: Convolution, image: tuple[Index, ...], row: Index) -> Iterator[RowTap]:
    """Loop over the kernel rows whose input row exists, for output row `row` of `image`, (batch) or (batch, plane)."""
    rows = _taps(conv.kernel[0], conv.stride[0], conv.padding[0], conv.dilation[0], conv.in_height, conv.out_height)
    if (depth := conv.depth) is None:
        with rows(row) as (tap, in_row):
            yield RowTap(tap, image, in_row)
        return
    planes = _taps(depth.kernel, depth.stride, depth.padding, depth.dilation, depth.in_planes, depth.out_planes)
    batch, plane = image
    with planes(plane) as (tap_plane, in_plane), rows(row) as (tap, in_row):
        yield RowTap(tap_plane * conv.kernel[0] + tap, (batch, in_plane), in_row)


TapLoop = Callable[[Index], AbstractContextManager[tuple[Index, Index]]]


def _taps(taps: int, stride: int, padding: int, dilation: int, inputs: int, outputs: int) -> TapLoop:
    """The loop along one dimension over the taps of an output position, each with the input position it reads."""

    @contextmanager
    def over(output: Index) -> Iterator[tuple[Index, Index]]:
        first = output * stride - padding  # input position of tap 0
        if padding <= 0 and (outputs - 1) * stride - padding + (taps - 1) * dilation < inputs:
            with loop(taps) as tap:
                yield tap, first + tap * dilation
            return
        begin = T.Bind(count_below(0, first, dilation, taps))
        end = T.Bind(count_below(inputs, first, dilation, taps))
        with T.serial(begin, tirx.max(begin, end)) as tap:
            yield tap, first + tap * dilation

    return over


@dataclass(frozen=True)
class DenseStage:
    """Emits a dense convolution over one task, or over the whole convolution with `emit`.

    Attributes:
        convolution: the problem. tiling: its blocking.
        source: input over (batch, row, column, channel). weight: packed weights, flat.
        bias: flat buffer of output channels, or None. sink: what becomes of finished vectors.
        one: `Frame.one`.
        turn_rows: how many rows `emit_rows` is asked for at a time, about.
        fetched: the tensors of which a block fetches the lines that its own results need.
        factor: instead of packed weights, a tensor over (batch, row, input channel, output channel).
    """

    convolution: Convolution
    tiling: DenseTiling
    source: Operand
    weight: Expr
    bias: Expr | None
    sink: Sink
    one: Expr
    turn_rows: int = 1
    fetched: Sequence[Fetched] = ()
    factor: Operand | None = None

    def emit(self, frame: Frame) -> None:
        """The whole convolution, shared by the threads of `frame`."""
        conv, tiling = self.convolution, self.tiling
        panels = Panels.of(conv, tiling.panel)
        segments = conv.column_segments(tiling.columns)
        row_tiles = ceil_div(conv.out_height, tiling.rows)
        column_tiles = ceil_div(max(s.repeat for s in segments), tiling.blocks)
        panel_tiles = ceil_div(panels.total, tiling.panels)
        tile_columns = conv.out_width if column_tiles == 1 else tiling.blocks * tiling.columns
        with frame.tasks((*conv.leading, conv.groups, row_tiles, column_tiles, panel_tiles)) as task:
            *image, group, row_tile, column_tile, panel_tile = task

            def panel_body(index: Index, widths: tuple[int, ...]) -> None:
                with loop(tile_span(row_tile, tiling.rows, conv.out_height, row_tiles)) as row:
                    visit = Visit(tiling.rows * tile_columns, (row - column_tile) * tile_columns)
                    block = _Block(
                        self, panels, widths, tuple(image), group, row_tile * tiling.rows + row, index, visit
                    )
                    for_each_block(segments, tiling.blocks, column_tile, column_tiles, block.emit)

            for_each_panel(panels, tiling.panels, panel_tile, panel_tiles, panel_body)

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """The output rows from `first` on and before `stop`, all panels and columns."""
        conv = self.convolution
        panels = Panels.of(conv, self.tiling.panel)
        segments = conv.column_segments(self.tiling.columns)
        blocks = max(segment.repeat for segment in segments)
        with loop(conv.groups) as group:
            if panels.count:
                with loop(panels.count) as index, T.serial(first, stop) as row:
                    visit = Visit(self.turn_rows * conv.out_width, (row - first) * conv.out_width)
                    block = _Block(self, panels, panels.widths, (batch,), group, row, index, visit)
                    for_each_block(segments, blocks, 0, 1, block.emit)
            if panels.tail:
                with T.serial(first, stop) as row:
                    visit = Visit(self.turn_rows * conv.out_width, (row - first) * conv.out_width)
                    block = _Block(self, panels, panels.tail, (batch,), group, row, panels.count, visit)
                    for_each_block(segments, blocks, 0, 1, block.emit)


def for_each_panel(
    panels: Panels, per_tile: int, tile: Index, tiles: int, body: Callable[[Index, tuple[int, ...]], None]
) -> None:
    """Call `body(panel, widths)` for the panels of one tile of `per_tile`; the narrower one belongs to the last."""
    if panels.count:
        with loop(tile_span(tile, per_tile, panels.count, tiles)) as index:
            body(tile * per_tile + index, panels.widths)
    if panels.tail:
        with when(tiles == 1 or tirx.EQ(tile, tiles - 1)):
            body(panels.count, panels.tail)


def for_each_block(
    segments: tuple[ColumnSegment, ...],
    blocks: int,
    tile: Index,
    tiles: int,
    body: Callable[[Index, ColumnSegment], None],
) -> None:
    """Call `body(first column, segment)` for the column blocks of one tile of a row.

    The longest run of interior blocks is a loop, of which each tile has `blocks`; what lies left of it belongs to the
    first tile, what lies right of it to the last.
    """
    looped = max(range(len(segments)), key=lambda index: segments[index].repeat)
    for position, segment in enumerate(segments):
        if position == looped:
            with loop(tile_span(tile, blocks, segment.repeat, tiles)) as index:
                start = (
                    segment.start if segment.repeat == 1 else segment.start + (tile * blocks + index) * segment.columns
                )
                body(start, segment)
        else:
            with when(tiles == 1 or tirx.EQ(tile, 0 if position < looped else tiles - 1)):
                body(segment.start, segment)


@dataclass(frozen=True)
class _Block:
    """The innermost loops: `columns × panel` outputs of one row, in registers."""

    stage: DenseStage
    panels: Panels
    widths: tuple[int, ...]
    image: tuple[Index, ...]
    group: Index
    row: Index
    panel: Index
    visit: Visit

    def emit(self, start: Index, segment: ColumnSegment) -> None:
        """Compute the block whose first column is `start` and hand each finished vector to the sink."""
        stage, conv = self.stage, self.stage.convolution
        channel = self.group * conv.group_out + self.panel * sum(self.panels.widths)
        block = replace(stage.tiling.block, columns=segment.columns, panel=self.widths)
        registers = Registers(block, conv, stage.one)
        vectors = list(zip(registers.offsets, self.widths, strict=True))
        bias = stage.bias
        registers.start(None if bias is None else [T.Bind(bias[ramp(channel + offset, n)]) for offset, n in vectors])
        with row_taps(conv, self.image, self.row) as tap:
            self._reduce(start, segment, registers, tap)
        for column, offset, value in registers.results():
            stage.sink((*self.image, self.row, start + column, channel + offset), value)

    def _reduce(self, start: Index, segment: ColumnSegment, registers: Registers, tap_row: RowTap) -> None:
        """Add the products of one kernel row to the registers, in blocks that can be added up in their type."""
        conv, first = self.stage.convolution, 0
        for columns, _, channels in conv.row_sums:
            valid = {tap: self._valid(segment, tap) for tap in range(first, first + columns)}
            first += columns
            if not any(any(of_tap) for of_tap in valid.values()):
                continue
            full, rest = divmod(conv.group_in, channels)
            with loop(full) as run:
                self._add(start, valid, registers, tap_row, run * channels, channels)
            if rest:
                self._add(start, valid, registers, tap_row, full * channels, rest)

    def _valid(self, segment: ColumnSegment, tap: int) -> list[bool]:
        """For each column of a block, whether its input at column `tap` of the kernel exists."""
        conv, columns = self.stage.convolution, range(segment.columns)
        return [segment.interior or conv.column_valid(segment.start + column, tap) for column in columns]

    def _add(
        self,
        start: Index,
        valid: dict[int, list[bool]],
        registers: Registers,
        tap_row: RowTap,
        first: Index,
        channels: int,
    ) -> None:
        """Add the products of input channels from `first` on at some taps, for the columns `valid` at each."""
        conv = self.stage.convolution
        # The first step of all is no part of the loop: there, the bias needs no copies of its own. (Of one column there
        # are none; LLVM then loads an odd number of weights at a time on Arm, in twice the time.)
        apart = conv.taps == 1 and not conv.sums_in_blocks and registers.block.columns > 1
        size = self._step_channels
        steps, rest = divmod(channels, size)
        for tap, of_tap in valid.items():
            if not any(of_tap):
                continue
            if apart:
                self._step(start, of_tap, registers, tap_row, tap, 0, size)
            if steps > apart:
                with T.serial(1, steps) if apart else loop(steps) as step:
                    self._step(start, of_tap, registers, tap_row, tap, first + step * size, size)
            for few in split_lanes(rest, size):
                self._step(start, of_tap, registers, tap_row, tap, first + channels - rest, few)
                rest -= few
        registers.end_block()

    @property
    def _step_channels(self) -> int:
        """Input channels of a step: those of the tiling, where they lie side by side."""
        size = self.stage.tiling.step_channels
        return size if self.stage.source.strides[-1] == 1 and size <= self.stage.convolution.group_in else 1

    def _step(
        self,
        start: Index,
        valid: list[bool],
        registers: Registers,
        tap_row: RowTap,
        tap: int,
        channel: Index,
        channels: int,
    ) -> None:
        """Add the products of one tap and `channels` input channels of the group, from `channel` on; only `valid`
        columns have that tap.
        """
        stage, conv = self.stage, self.stage.convolution
        reduction = conv.taps * conv.group_in
        width = sum(self.panels.widths)
        panel_base = (self.group * conv.group_out + self.panel * width) * reduction
        row = (tap_row.index * conv.kernel[1] + tap) * conv.group_in + channel
        if stage.factor is None:
            # Before all loads: after one, LLVM broadcasts an input twice for a panel of two widths (96→24 channels on
            # Sapphire Rapids: 7.6 µs, and so 5.2).
            steps = ceil_div(reduction, self._step_channels)
            share = WeightShare(self.visit, stage.tiling.columns, width * reduction, steps, panel_base)
            share.prefetch(stage.weight, row // self._step_channels, start)
            self._fetch_ahead(row // self._step_channels, start, steps)
            self._fetch_tensors(row // self._step_channels, start, steps)
        inputs: list[list[Expr] | None] = []
        for index, is_valid in enumerate(valid):
            in_column = (start + index) * conv.stride[1] - conv.padding[1] + tap * conv.dilation[1]
            in_channel = self.group * conv.group_in + channel
            position = (*tap_row.image, tap_row.row, in_column, in_channel)
            inputs.append(stage.source.load_each(position, channels) if is_valid else None)
        for index in range(channels):
            weights = self._weights(registers, channel + index, panel_base + (row + index) * sum(self.widths))
            registers.multiply_add([None if own is None else own[index] for own in inputs], weights)

    def _fetch_ahead(self, step: Index, start: Index, steps: int) -> None:
        """Fetch in iteration number `step`, out of so many, of the block at column `start` for later kernels."""
        stage, conv = self.stage, self.stage.convolution
        rows = self.panel * conv.out_height + self.row
        elements, pixels = conv.out_channels * conv.taps * conv.group_in, conv.out_height * conv.out_width
        for ahead in stage.tiling.ahead:
            visits, first = self.panels.total * pixels, rows * conv.out_width
            AheadShare(ahead, elements, visits, first, stage.tiling.columns, steps).prefetch(stage.weight, step, start)

    def _fetch_tensors(self, step: Index, start: Index, steps: int) -> None:
        """Fetch in iteration number `step`, out of so many, of the block at column `start` what its results need, and
        what the next block reads: of a pointwise convolution, so that this is the next pixels.
        """
        stage, conv, columns = self.stage, self.stage.convolution, self.stage.tiling.columns
        width = sum(self.widths)
        own = (*self.image, self.row, start, self.group * conv.group_out + self.panel * sum(self.panels.widths))
        shares = [PixelShare(one, own, columns, width, steps) for one in stage.fetched]
        if "input" in stage.tiling.fetched:
            apart = conv.stride[1]
            following = (*self.image, self.row * conv.stride[0], (start + columns) * apart, 0)
            shares.append(PixelShare(Fetched(stage.source), following, columns, conv.in_channels, steps, apart))
        for share in shares:
            share.prefetch(step)

    def _weights(self, registers: Registers, channel: Index, base: Index) -> list[Expr]:
        """The panel's vectors of weights of one input channel, which are packed at `base`."""
        stage = self.stage
        vectors = list(zip(registers.offsets, self.widths, strict=True))
        if stage.factor is None:
            return [T.Bind(stage.weight[ramp(base + offset, lanes)]) for offset, lanes in vectors]
        first, column = (*self.image, self.row, channel), self.panel * sum(self.panels.widths)
        return [T.Bind(stage.factor.load((*first, column + offset), n)) for offset, n in vectors]
