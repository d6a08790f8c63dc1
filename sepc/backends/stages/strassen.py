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

from sepc.backends.stages.kernel import for_each_vector, loop, when
from sepc.backends.stages.product import Block, ProductStage, Registers, Task, pack, slot_pixels, task_pixels
from sepc.backends.stages.vector import Expr, FloatArray, Index, Operand, constant, ramp
from sepc.cost_model.tiling import StrassenTiling
from sepc.ir.convolution import Convolution

SUMS = 4
# An epilogue of more instructions is emitted once for all columns of a block: unrolled, four of them thrash the cache
# of instructions.
MOST_UNROLLED_INSTRUCTIONS = 4


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
# In the order in which `StrassenStage.pack_weights` has the right factors.
PRODUCTS = (
    Product("A11", None, keep=_X),
    Product("A12", _X, finish=(0, 0)),
    Product("S2", _X, keep=_X),
    Product("S3", _X, keep=_Y),
    Product("A22", _Y, finish=(1, 0)),
    Product("S1", None, finish=(1, 1), finish_plus=_Y, keep=_Z, keep_plus=_X),
    Product("S4", _Z, finish=(0, 1)),
)


class StrassenStage(ProductStage[StrassenTiling]):
    """Emits a matrix product; each of the seven is of halves."""

    @staticmethod
    def pack_weights(weight: FloatArray, convolution: Convolution, tiling: StrassenTiling) -> NDArray[np.float32]:
        """`weight` [O, I, 1, 1] as [panel][product][input channel][panel lane]."""
        matrix = weight.reshape(convolution.out_channels, convolution.in_channels).T.astype(np.float64)
        (b11, b12), (b21, b22) = (np.hsplit(rows, 2) for rows in np.vsplit(matrix, 2))
        t1 = b12 - b11
        t2, t3 = b22 - t1, b22 - b12
        return pack(np.stack([b11, b21, t2, t3, b21 - t2, t1, b22]), tiling.product.panel)

    @staticmethod
    def scratch_elements(convolution: Convolution, tiling: StrassenTiling) -> int:
        """Sums of the input, [sum][pixel][channel], and [slot][pixel][lane]."""
        half = tiling.product_of(convolution)
        slots = (_RESULT + 1) * slot_pixels(half, tiling) * sum(tiling.product.panel)
        return SUMS * task_pixels(half, tiling.product) * half.in_channels + slots

    def _panel(self, task: Task, panel: Index, widths: tuple[int, ...]) -> None:
        every = range(self.tiling.count)
        for numbers in [[number] for number in every] if self.tiling.by_product else [every]:
            emit = partial(self._emit_block, task, numbers)
            task.for_each_block(panel, widths, emit)

    def _emit_block(self, task: Task, numbers: Sequence[int], block: Block) -> None:
        _Block(self, task, block).emit(numbers)

    def quarter(self, name: str, first: Index) -> Operand:
        """A quarter of the input, or a sum of quarters whose first pixel is `first`, over (_, _, pixel, channel)."""
        half = self.product
        if name.startswith("S"):
            size = task_pixels(half, self.tiling.product) * half.in_channels
            offset = self.scratch.base + (int(name[1]) - 1) * size - first * half.in_channels
            return Operand(self.scratch.buffer, (0, 0, half.in_channels, 1), offset)
        row, column = int(name[1]) - 1, int(name[2]) - 1
        pixel, channel = row * (self.convolution.out_width - half.out_width), column * half.in_channels
        offset = self.source.offset + pixel * self.source.strides[2] + channel * self.source.strides[3]
        return Operand(self.source.buffer, self.source.strides, offset)

    def _prepare(self, task: Task) -> None:
        """S1 to S4 of the task's pixels."""
        first, half = task.first, self.product
        quarters = {name: self.quarter(name, first) for name in ("A11", "A12", "A21", "A22")}
        sums = {name: self.quarter(name, first) for name in ("S1", "S2", "S3", "S4")}
        with T.serial(task.pixels) as pixel:

            def at(channel: Index, lanes: int, turn: int) -> None:
                position = (0, 0, first + pixel, channel)
                a11, a12, a21, a22 = (T.Bind(quarter.load(position, lanes)) for quarter in quarters.values())
                s1 = T.Bind(a21 + a22)
                s2 = T.Bind(s1 - a11)
                for operand, value in zip(sums.values(), (s1, s2, a11 - a21, a12 - s2), strict=True):
                    operand.store(position, value)

            for_each_vector(half.in_channels, self.lanes, at)


@dataclass(frozen=True)
class _Block:
    """The innermost loops: one block of some products, in registers."""

    stage: StrassenStage
    task: Task
    block: Block

    def emit(self, numbers: Sequence[int]) -> None:
        """Compute the products `numbers`."""
        registers = self.block.registers()
        held = -1  # the slot whose contents the registers hold
        for number in numbers:
            product = PRODUCTS[number]
            if product.start is None or product.start != held:
                self._load(registers, product.start)
            left = self.stage.quarter(product.left, self.task.first)
            self.task.products.multiply(registers, left, number, self.block)
            if product.finish is not None:
                self._finish(registers, product)
            held = -1
            if product.keep is not None:
                self._keep(registers, product.keep, product.keep_plus)
                held = product.keep

    def _finish(self, registers: Registers, product: Product) -> None:
        """Hand a quarter of the result to the sink."""
        if self.stage.epilogue_cost <= MOST_UNROLLED_INSTRUCTIONS:
            for index, column in enumerate(registers):
                self._hand_over([register.value for register in column], index, product)
            return
        self._keep(registers, _RESULT, None)
        with loop(len(registers)) as index:
            values = [T.Bind(self._kept(_RESULT, index, vector)) for vector in range(len(self.block.widths))]
            self._hand_over(values, index, product)

    def _hand_over(self, values: Sequence[Expr], index: Index, product: Product) -> None:
        """Finish the vectors of column `index` of the block."""
        stage, half, block = self.stage, self.stage.product, self.block
        row, column = product.finish or (0, 0)
        shift = row * (stage.convolution.out_width - half.out_width)
        # Where halves overlap, the last pixel of the upper one is the lower one's first.
        overlap = 2 * half.out_width > stage.convolution.out_width and row == 0
        twice = overlap and not (isinstance(index, int) and index < block.columns - 1)
        with when(tirx.NE(block.start + index, half.out_width - 1) if twice else True):
            channel = column * half.out_channels + block.panel * sum(self.task.products.panels.widths)
            for vector, sum_ in enumerate(values):
                lanes, terms = block.widths[vector], [sum_]
                if product.finish_plus is not None:
                    terms.append(self._kept(product.finish_plus, index, vector))
                if stage.bias is not None:
                    terms.append(stage.bias[ramp(channel, lanes)])
                stage.sink((0, 0, block.start + (index + shift), channel), T.Bind(sum(terms[1:], terms[0])))
                channel = channel + lanes

    def _kept(self, slot: int, index: Index, vector: int) -> Expr:
        """Vector `vector` of column `index` of the block, as it is in `slot`."""
        return self.stage.scratch.buffer[self._where(slot, index, vector)]

    def _where(self, slot: int, index: Index, vector: int) -> Expr:
        tiling, half, widths = self.stage.tiling, self.stage.product, self.block.widths
        before = self.block.start - self.task.first if tiling.by_product else 0
        pixel = slot * slot_pixels(half, tiling) + index + before
        sums = SUMS * task_pixels(half, tiling.product) * half.in_channels
        offset = sums + pixel * sum(tiling.product.panel) + sum(widths[:vector])
        return ramp(self.stage.scratch.base + offset, widths[vector])

    def _keep(self, registers: Registers, slot: int, plus: int | None) -> None:
        """Keep the registers in `slot`, with what is in slot `plus` added to them."""
        for index, column in enumerate(registers):
            for vector, register in enumerate(column):
                if plus is not None:
                    register.set(register.value + self._kept(plus, index, vector))
                T.buffer_store(self.stage.scratch.buffer, register.value, [self._where(slot, index, vector)])

    def _load(self, registers: Registers, slot: int | None) -> None:
        """Set the registers to what is in `slot`, or 0."""
        for index, column in enumerate(registers):
            for vector, register in enumerate(column):
                register.set(constant(0, register.lanes) if slot is None else self._kept(slot, index, vector))
