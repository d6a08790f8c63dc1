"""The tile stage: a 3×3 convolution by Winograd's algorithm, with 16 multiplications instead of 36 for 2×2 results.

For a tile d of n×n inputs (n = outputs + 2), a filter g of 3×3 and m×m results Y, with ⊙ elementwise:

    Y = Aᵀ [ Σ_i (G g_i Gᵀ) ⊙ (Bᵀ d_i B) ] A            A [n, m], G [n, 3], B [n, n] as in `sepc.ir.winograd`

Each of the n² positions of a tile is a matrix product of its own over the input channels i: (tiles × input channels)
times (input × output channels). G g Gᵀ is computed in float64 when weights are packed; Bᵀ d B per task, into scratch.
The products of a block of tiles go to scratch as well, from where Aᵀ P A becomes results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.kernel import for_each_vector, loop, when
from sepc.backends.stages.product import Block, ProductStage, Task, pack, slot_pixels, task_pixels
from sepc.backends.stages.vector import LINE_FLOATS, Expr, FloatArray, Index, Operand, constant, ramp
from sepc.cost_model.tiling import WinogradTiling
from sepc.ir.convolution import Convolution
from sepc.ir.winograd import Matrix, transforms


def _input_elements(product: Convolution, tiling: WinogradTiling) -> int:
    """Scratch for one position of all inputs; a line more, so that positions do not compete for the same sets."""
    return task_pixels(product, tiling.product) * product.in_channels + LINE_FLOATS


def _product_elements(product: Convolution, tiling: WinogradTiling) -> int:
    return slot_pixels(product, tiling) * sum(tiling.product.panel) + LINE_FLOATS


class WinogradStage(ProductStage[WinogradTiling]):
    """Emits a 3×3 convolution of stride 1; a pixel of a product is a tile."""

    @staticmethod
    def pack_weights(weight: FloatArray, convolution: Convolution, tiling: WinogradTiling) -> NDArray[np.float32]:
        """`weight` [O, I, 3, 3] as [panel][position][input channel][panel lane]."""
        filters = transforms(tiling.outputs).filters
        factors = np.einsum("pr,oirc,qc->pqio", filters, weight.astype(np.float64), filters, optimize=True)
        return pack(factors.reshape(-1, *factors.shape[2:]), tiling.product.panel)

    @staticmethod
    def scratch_elements(convolution: Convolution, tiling: WinogradTiling) -> int:
        """Transformed inputs, [position][tile][channel], and products, [position][tile][lane]."""
        product = tiling.product_of(convolution)
        return tiling.count * (_input_elements(product, tiling) + _product_elements(product, tiling))

    def _panel(self, task: Task, panel: Index, widths: tuple[int, ...]) -> None:
        if not self.tiling.by_product:
            task.for_each_block(panel, widths, lambda block: self._block(task, block))
            return
        with loop(self.tiling.count) as number:
            task.for_each_block(panel, widths, lambda block: self._multiply(task, number, block))
        with T.serial(task.pixels) as tile:
            self._transform_products(task, panel, widths, task.first + tile, tile)

    def _block(self, task: Task, block: Block) -> None:
        """All products of a block, and its results."""
        with loop(self.tiling.count) as number:
            self._multiply(task, number, block)
        with loop(block.columns) as index:
            self._transform_products(task, block.panel, block.widths, block.start + index, index)

    def _multiply(self, task: Task, number: Index, block: Block) -> None:
        """Product `number` of a block."""
        registers = block.registers()
        for column in registers:
            for register in column:
                register.set(constant(0, register.lanes))
        size, channels = _input_elements(self.product, self.tiling), self.product.in_channels
        offset = self.scratch.base + number * size - task.first * channels
        task.products.multiply(registers, Operand(self.scratch.buffer, (0, 0, channels, 1), offset), number, block)
        before = block.start - task.first if self.tiling.by_product else 0
        for index, column in enumerate(registers):
            lane = 0
            for register in column:
                where = ramp(self._kept(number, index + before) + lane, register.lanes)
                T.buffer_store(self.scratch.buffer, register.value, [where])
                lane += register.lanes

    def _kept(self, number: Index, slot: Index) -> Index:
        """Where product `number` of the tile in `slot` is kept."""
        inputs = self.tiling.count * _input_elements(self.product, self.tiling)
        size = _product_elements(self.product, self.tiling)
        return self.scratch.base + inputs + number * size + slot * sum(self.tiling.product.panel)

    def _corner(self, tile: Index) -> tuple[Index, Index, Index]:
        """Image, row and column of the tile's first result."""
        tiles_high, tiles_wide = self.convolution.winograd_tiles(self.tiling.outputs)
        line = T.Bind(tirx.truncdiv(tile, tiles_wide))
        column = tirx.truncmod(tile, tiles_wide) * self.tiling.outputs
        return tirx.truncdiv(line, tiles_high), tirx.truncmod(line, tiles_high) * self.tiling.outputs, column

    def _prepare(self, task: Task) -> None:
        """Bᵀ d B of the task's tiles."""
        conv, size = self.convolution, self.tiling.size
        with T.serial(task.pixels) as slot:
            batch, row, column = map(T.Bind, self._corner(task.first + slot))
            top, left = T.Bind(row - conv.padding[0]), T.Bind(column - conv.padding[1])
            rows_inside = tirx.And(top >= 0, top + size <= conv.in_height)
            inside = tirx.And(rows_inside, tirx.And(left >= 0, left + size <= conv.in_width))
            with T.If(inside):
                with T.Then():
                    self._transform_input(slot, lambda i, j, *at: self._load(batch, top + i, left + j, *at))
                with T.Else():
                    self._transform_input(slot, lambda i, j, *at: self._load_checked(batch, top + i, left + j, *at))

    def _load(self, batch: Index, row: Index, column: Index, channel: Index, lanes: int) -> Expr:
        return self.source.load((batch, row, column, channel), lanes)

    def _load_checked(self, batch: Index, row: Index, column: Index, channel: Index, lanes: int) -> Expr:
        """The same, 0 outside the input."""
        rows = tirx.And(row >= 0, row < self.convolution.in_height)
        columns = tirx.And(column >= 0, column < self.convolution.in_width)
        value = self._load(batch, row, column, channel, lanes)
        return tirx.if_then_else(tirx.And(rows, columns), value, constant(0, lanes))

    def _transform_input(self, slot: Index, load: Callable[[int, int, Index, int], Expr]) -> None:
        """Bᵀ d B of the tile in `slot`; `load` reads a vector of it."""
        matrix, channels = transforms(self.tiling.outputs).inputs, self.convolution.in_channels
        size = _input_elements(self.product, self.tiling)

        def at(channel: Index, lanes: int, turn: int) -> None:
            tile = [[T.Bind(load(i, j, channel, lanes)) for j in range(len(matrix))] for i in range(len(matrix))]
            for number, value in enumerate(_on_both_sides(matrix, tile)):
                where = self.scratch.base + number * size + slot * channels + channel
                T.buffer_store(self.scratch.buffer, value, [ramp(where, lanes)])

        for_each_vector(channels, self.lanes, at)

    def _transform_products(self, task: Task, panel: Index, widths: tuple[int, ...], tile: Index, slot: Index) -> None:
        """Aᵀ P A of a tile, to the sink."""
        matrix, conv = transforms(self.tiling.outputs).outputs, self.convolution
        outputs, size = matrix.shape
        batch, top, left = map(T.Bind, self._corner(tile))
        first = panel * sum(task.products.panels.widths)

        def at(lane: Index, lanes: int) -> None:
            products = [
                [self.scratch.buffer[ramp(self._kept(i * size + j, slot) + lane, lanes)] for j in range(size)]
                for i in range(size)
            ]
            results = _on_both_sides(matrix, products)
            for number, value in enumerate(results):
                row, column = top + number // outputs, left + number % outputs
                total = value if self.bias is None else value + self.bias[ramp(first + lane, lanes)]
                with when(_below(row, conv.out_height, outputs)), when(_below(column, conv.out_width, outputs)):
                    self.sink((batch, row, column, first + lane), T.Bind(total))

        if len(set(widths)) == 1:
            with loop(len(widths)) as vector:
                at(vector * widths[0], widths[0])
        else:
            for index, lanes in enumerate(widths):
                at(sum(widths[:index]), lanes)


def _below(position: Index, extent: int, tile: int) -> Expr | bool:
    """Whether a position of a tile exists; known where tiles cover the extent exactly."""
    return True if extent % tile == 0 else position < extent


def _on_both_sides(matrix: Matrix, tile: Sequence[Sequence[Expr]]) -> list[Expr]:
    """M T Mᵀ for a tile T of vectors, row by row."""
    columns = [_combinations(matrix, column) for column in zip(*tile, strict=True)]
    return [value for row in zip(*columns, strict=True) for value in _combinations(matrix, row)]


def _combinations(matrix: Matrix, values: Sequence[Expr]) -> list[Expr]:
    """M v for a column v of vectors."""
    return [T.Bind(_combination(row, values)) for row in matrix]


def _combination(coefficients: NDArray[np.float64], values: Sequence[Expr]) -> Expr:
    """The sum of the `values`, each times its coefficient; those of ±1 first, the rest by multiply-adds."""
    terms = sorted((abs(abs(c) - 1), -c, index) for index, c in enumerate(coefficients) if c != 0)
    total: Expr = None
    for _, negative, index in terms:
        coefficient, value = -negative, values[index]
        if total is None:
            total = value if coefficient == 1 else value * tirx.const(coefficient, "float32")
        elif abs(coefficient) == 1:
            total = total + value if coefficient > 0 else total - value
        else:
            total = total + value * constant(coefficient, int(value.ty.dtype.lanes))
    return total
