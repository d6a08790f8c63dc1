"""The product stage: a matrix product from seven products of its halves, an eighth less arithmetic.

Input A (pixels × input channels), weights B (input × output channels) and result C in quarters, Strassen's algorithm in
the form of Winograd:

    S1 = A21 + A22    S2 = S1 − A11    S3 = A11 − A21    S4 = A12 − S2        computed per task, into scratch
    T1 = B12 − B11    T2 = B22 − T1    T3 = B22 − B12    T4 = T2 − B21        computed once, when weights are packed
    X  = A11·B11                         C11 = X + A12·B21
    X += S2·T2        Y = X + S3·T3      C21 = Y − A22·T4
    Z  = S1·T1                           C22 = Z + Y              C12 = Z + X + S4·B22

Each product is computed in blocks of `columns × panel`, started from the sum that it is added to. Either all seven of
one block follow each other, the sums staying in registers where they can, or all blocks of a task do for each product:
then a product's weights are all that the caches have to hold, and sums come from scratch.

Halves of an odd number of pixels overlap in the middle one, which only the lower half writes. The error is bounded like
that of the plain product, with a constant a few times larger (Higham, Accuracy and Stability of Numerical Algorithms,
section 23.2.2): relative to the largest result it was 2 to 5 times as large as the plain product's, at most 3e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.dense import Panels, Sink, Visit, WeightShare, for_each_block, for_each_panel
from sepc.backends.stages.kernel import Frame, loop, when
from sepc.backends.stages.vector import Accumulator, Expr, Index, Operand, broadcast, constant, ramp
from sepc.cost_model.tiling import StrassenTiling
from sepc.errors import VerificationError
from sepc.ir.stage import ColumnSegment, Convolution, ceil_div, split_lanes

SUMS = 4
# An epilogue of more instructions is emitted once for all columns of a block: unrolled, four of them thrash the cache
# of instructions.
MOST_UNROLLED_INSTRUCTIONS = 4


def halves_of(convolution: Convolution) -> Convolution:
    """The convolution of the halves; raises VerificationError where `convolution` is no matrix product."""
    half = convolution.halves
    if half is None:
        raise VerificationError("A convolution is no matrix product of even extents", why=str(convolution))
    return half


def pack_weights(weight: NDArray[np.float32], convolution: Convolution, panel: tuple[int, ...]) -> NDArray[np.float32]:
    """`weight` [O, I, 1, 1] as the flat array that the kernel reads: [panel][product][input channel][panel lane]."""
    half = halves_of(convolution)
    panels, width = Panels.of(half, panel), sum(panel)
    matrix = weight.reshape(convolution.out_channels, convolution.in_channels).T.astype(np.float64)
    (b11, b12), (b21, b22) = (np.hsplit(rows, 2) for rows in np.vsplit(matrix, 2))
    t1 = b12 - b11
    t2, t3 = b22 - t1, b22 - b12
    factors = np.stack([b11, b21, t2, t3, b21 - t2, t1, b22]).astype(np.float32)
    pieces = [factors[..., index * width : (index + 1) * width].ravel() for index in range(panels.total)]
    return np.ascontiguousarray(np.concatenate(pieces))


@dataclass(frozen=True)
class Product:
    """One of the seven: `left` times the weights at its place in the order, added to what is kept in slot `start`.

    Attributes:
        left: name of the left factor. start: a slot, or None for 0.
        keep: a slot for the sum; `keep_plus` is a slot that is added to it before.
        finish: the quarter of the result (row, column) that the sum is; `finish_plus` is a slot that is added to it.
    """

    left: str
    start: int | None
    keep: int | None = None
    keep_plus: int | None = None
    finish: tuple[int, int] | None = None
    finish_plus: int | None = None


_X, _Y, _Z, _RESULT = range(4)
# In the order in which `pack_weights` has the right factors.
PRODUCTS = (
    Product("A11", None, keep=_X),
    Product("A12", _X, finish=(0, 0)),
    Product("S2", _X, keep=_X),
    Product("S3", _X, keep=_Y),
    Product("A22", _Y, finish=(1, 0)),
    Product("S1", None, finish=(1, 1), finish_plus=_Y, keep=_Z, keep_plus=_X),
    Product("S4", _Z, finish=(0, 1)),
)


@dataclass(frozen=True)
class Scratch:
    """Where a thread keeps sums of the input, [sum][pixel][channel], and behind them the slots, [pixel][lane] each."""

    buffer: Expr
    base: Index


def scratch_elements(convolution: Convolution, tiling: StrassenTiling) -> int:
    """Elements of scratch that a thread needs."""
    half = halves_of(convolution)
    slots = (_RESULT + 1) * _slot_pixels(half, tiling) * sum(tiling.half.panel)
    return SUMS * _task_pixels(half, tiling) * half.in_channels + slots


def _task_pixels(half: Convolution, tiling: StrassenTiling) -> int:
    """The most pixels of a half that a task computes: the last one also those that do not fill a block."""
    block = tiling.half
    return min(half.out_width, block.blocks * block.columns + half.out_width % block.columns)


def _slot_pixels(half: Convolution, tiling: StrassenTiling) -> int:
    """Pixels whose sums are kept at a time."""
    return _task_pixels(half, tiling) if tiling.by_product else tiling.half.columns


@dataclass(frozen=True)
class StrassenStage:
    """Emits a matrix product.

    Attributes are those of `DenseStage`, and:

        lanes: the width of a full vector. scratch: memory for intermediate results.
        epilogue_cost: instructions that the sink takes for a vector.
    """

    convolution: Convolution
    tiling: StrassenTiling
    lanes: int
    source: Operand
    weight: Expr
    bias: Expr | None
    sink: Sink
    scratch: Scratch
    epilogue_cost: int

    def emit(self, frame: Frame) -> None:
        """The whole product, shared by the threads of `frame`."""
        half, block = halves_of(self.convolution), self.tiling.half
        panels, segments = Panels.of(half, block.panel), half.column_segments(block.columns)
        column_tiles = ceil_div(max(s.repeat for s in segments), block.blocks)
        panel_tiles = ceil_div(panels.total, block.panels)
        with frame.tasks((column_tiles, panel_tiles)) as (column_tile, panel_tile):
            first = column_tile * (block.blocks * block.columns)
            last = tirx.EQ(column_tile, column_tiles - 1) if column_tiles > 1 else True
            full = block.blocks * block.columns
            pixels = half.out_width if column_tiles == 1 else tirx.Select(last, half.out_width - first, full)
            self._sums(half, first, pixels)
            visit = Visit(half.out_width if column_tiles == 1 else full, -first)

            def panel_body(index: Index, widths: tuple[int, ...]) -> None:
                blocks = _Blocks(self, half, panels, widths, index, first, visit)
                groups = (
                    [[number] for number in range(len(PRODUCTS))]
                    if self.tiling.by_product
                    else [list(range(len(PRODUCTS)))]
                )
                for numbers in groups:
                    emit = partial(blocks.emit, numbers)
                    for_each_block(segments, block.blocks, column_tile, column_tiles, emit)

            for_each_panel(panels, block.panels, panel_tile, panel_tiles, panel_body)

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """Not to be had: halves are halves of everything."""
        raise VerificationError("A matrix product in halves cannot be computed a few rows at a time")

    def quarter(self, name: str, half: Convolution, first: Index) -> Operand:
        """A quarter of the input, or a sum of quarters, over (batch, row, pixel of a half, channel)."""
        if name.startswith("S"):
            size = _task_pixels(half, self.tiling) * half.in_channels
            offset = self.scratch.base + (int(name[1]) - 1) * size - first * half.in_channels
            return Operand(self.scratch.buffer, (0, 0, half.in_channels, 1), offset)
        row, column = int(name[1]) - 1, int(name[2]) - 1
        pixel, channel = row * (self.convolution.out_width - half.out_width), column * half.in_channels
        offset = self.source.offset + pixel * self.source.strides[2] + channel * self.source.strides[3]
        return Operand(self.source.buffer, self.source.strides, offset)

    def _sums(self, half: Convolution, first: Index, pixels: Index) -> None:
        """S1 to S4 of the `pixels` from `first` on."""
        quarters = {name: self.quarter(name, half, first) for name in ("A11", "A12", "A21", "A22")}
        sums = {name: self.quarter(name, half, first) for name in ("S1", "S2", "S3", "S4")}
        count, rest = divmod(half.in_channels, self.lanes)

        def at(pixel: Index, channel: Index, lanes: int) -> None:
            position = (0, 0, first + pixel, channel)
            a11, a12, a21, a22 = (T.Bind(quarter.load(position, lanes)) for quarter in quarters.values())
            s1 = T.Bind(a21 + a22)
            s2 = T.Bind(s1 - a11)
            for operand, value in zip(sums.values(), (s1, s2, a11 - a21, a12 - s2), strict=True):
                operand.store(position, value)

        with T.serial(pixels) as pixel:
            if count:
                with loop(count) as vector:
                    at(pixel, vector * self.lanes, self.lanes)
            channel = count * self.lanes
            for lanes in split_lanes(rest, self.lanes):
                at(pixel, channel, lanes)
                channel += lanes


Registers = list[list[Accumulator]]  # by column and vector


@dataclass(frozen=True)
class _Blocks:
    """The innermost loops: `columns × panel` results of some products, in registers."""

    stage: StrassenStage
    half: Convolution
    panels: Panels
    widths: tuple[int, ...]
    panel: Index
    first: Index
    visit: Visit

    def emit(self, numbers: Sequence[int], start: Index, segment: ColumnSegment) -> None:
        """Compute the products `numbers` of the block whose first column is `start`."""
        registers = [[Accumulator(lanes) for lanes in self.widths] for _ in range(segment.columns)]
        held = -1  # the slot whose contents the registers hold
        for number in numbers:
            product = PRODUCTS[number]
            if product.start is None or product.start != held:
                self._load(registers, start, product.start)
            self._multiply(registers, start, number)
            if product.finish is not None:
                self._finish(registers, start, product)
            held = -1
            if product.keep is not None:
                self._keep(registers, start, product.keep, product.keep_plus)
                held = product.keep

    def _multiply(self, registers: Registers, start: Index, number: int) -> None:
        """Add product `number` to the registers."""
        stage, half = self.stage, self.half
        left = stage.quarter(PRODUCTS[number].left, half, self.first)
        width, of_product = sum(self.panels.widths), half.in_channels * sum(self.widths)
        panel_base = self.panel * (len(PRODUCTS) * half.in_channels * width)
        product_base = panel_base + number * of_product
        columns, by_product = stage.tiling.half.columns, stage.tiling.by_product
        steps = half.in_channels if by_product else len(PRODUCTS) * half.in_channels
        share = WeightShare(self.visit, columns, self.widths, steps, product_base if by_product else panel_base)
        with loop(half.in_channels) as channel:
            base, weights = product_base + channel * sum(self.widths), []
            for lanes in self.widths:
                weights.append(T.Bind(stage.weight[ramp(base, lanes)]))
                base = base + lanes
            share.prefetch(stage.weight, channel if by_product else number * half.in_channels + channel, start)
            for index, column in enumerate(registers):
                value = left.load((0, 0, start + index, channel))
                for register, weight in zip(column, weights, strict=True):
                    register.set(register.value + broadcast(value, register.lanes) * weight)

    def _finish(self, registers: Registers, start: Index, product: Product) -> None:
        """Hand a quarter of the result to the sink."""
        if self.stage.epilogue_cost <= MOST_UNROLLED_INSTRUCTIONS:
            for index, column in enumerate(registers):
                self._hand_over([register.value for register in column], start, index, len(registers), product)
            return
        self._keep(registers, start, _RESULT, None)
        with loop(len(registers)) as index:
            values = [T.Bind(self._kept(_RESULT, start, index, vector)) for vector in range(len(self.widths))]
            self._hand_over(values, start, index, len(registers), product)

    def _hand_over(self, values: Sequence[Expr], start: Index, index: Index, columns: int, product: Product) -> None:
        """Finish the vectors of column `index` of a block of `columns`."""
        stage, half = self.stage, self.half
        row, column = product.finish or (0, 0)
        shift = row * (stage.convolution.out_width - half.out_width)
        # Where halves overlap, the last pixel of the upper one is the lower one's first.
        overlap = 2 * half.out_width > stage.convolution.out_width and row == 0
        twice = overlap and not (isinstance(index, int) and index < columns - 1)
        with when(tirx.NE(start + index, half.out_width - 1) if twice else True):
            channel = column * half.out_channels + self.panel * sum(self.panels.widths)
            for vector, sum_ in enumerate(values):
                terms = [sum_]
                if product.finish_plus is not None:
                    terms.append(self._kept(product.finish_plus, start, index, vector))
                if stage.bias is not None:
                    terms.append(stage.bias[ramp(channel, self.widths[vector])])
                stage.sink((0, 0, start + (index + shift), channel), T.Bind(sum(terms[1:], terms[0])))
                channel = channel + self.widths[vector]

    def _kept(self, slot: int, start: Index, index: Index, vector: int) -> Expr:
        """Vector `vector` of column `index` of the block, as it is in `slot`."""
        return self.stage.scratch.buffer[self._where(slot, start, index, vector)]

    def _where(self, slot: int, start: Index, index: Index, vector: int) -> Expr:
        tiling = self.stage.tiling
        pixel = slot * _slot_pixels(self.half, tiling) + index + (start - self.first if tiling.by_product else 0)
        sums = SUMS * _task_pixels(self.half, tiling) * self.half.in_channels
        offset = sums + pixel * sum(tiling.half.panel) + sum(self.widths[:vector])
        return ramp(self.stage.scratch.base + offset, self.widths[vector])

    def _keep(self, registers: Registers, start: Index, slot: int, plus: int | None) -> None:
        """Keep the registers in `slot`, with what is in slot `plus` added to them."""
        for index, column in enumerate(registers):
            for vector, register in enumerate(column):
                if plus is not None:
                    register.set(register.value + self._kept(plus, start, index, vector))
                where = self._where(slot, start, index, vector)
                T.buffer_store(self.stage.scratch.buffer, register.value, [where])

    def _load(self, registers: Registers, start: Index, slot: int | None) -> None:
        """Set the registers to what is in `slot`, or 0."""
        for index, column in enumerate(registers):
            for vector, register in enumerate(column):
                register.set(constant(0, register.lanes) if slot is None else self._kept(slot, start, index, vector))
