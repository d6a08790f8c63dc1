"""Several matrix products of one shape whose blocks alternate: what the fast algorithms are made of.

    P_k[pixel, o] = Σ_i L_k[pixel, i] · R_k[i, o]        for k = 0, 1, …

The right factors are known when weights are packed: [panel][product][input channel][panel lane].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.dense import Panels, Sink, for_each_block, for_each_panel
from sepc.backends.stages.fetching import AheadShare, Visit, WeightShare
from sepc.backends.stages.kernel import Frame, loop
from sepc.backends.stages.vector import Accumulator, Expr, FloatArray, Index, Operand, ramp, repeated
from sepc.cost_model.tiling import DenseTiling, Narrow, ProductTiling, RegisterBlock
from sepc.errors import VerificationError
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import ColumnSegment, Convolution

Registers = list[list[Accumulator]]  # by column and vector


def pack(factors: NDArray[np.float64], panel: tuple[int, ...]) -> NDArray[np.float32]:
    """The right factors [product, input channel, output channel] as the flat array that the kernel reads."""
    width = sum(panel)
    starts = range(0, factors.shape[2], width)
    pieces = [factors[..., start : start + width].astype(np.float32).ravel() for start in starts]
    return np.ascontiguousarray(np.concatenate(pieces))


@dataclass(frozen=True)
class Scratch:
    """Where a thread keeps intermediate results."""

    buffer: Expr
    base: Index


def task_pixels(product: Convolution, block: DenseTiling) -> int:
    """The most pixels that a task computes: the last one also those that do not fill a block."""
    return min(product.out_width, block.blocks * block.columns + product.out_width % block.columns)


def slot_pixels(product: Convolution, tiling: ProductTiling) -> int:
    """Pixels whose sums are kept at a time."""
    return task_pixels(product, tiling.product) if tiling.by_product else tiling.product.columns


@dataclass(frozen=True)
class Products:
    """How tasks share the products, and the innermost loops.

    Attributes:
        product: one of them, a pointwise convolution over a single row. tiling: its blocking.
        weight: the packed right factors.
    """

    product: Convolution
    tiling: ProductTiling
    weight: Expr

    @property
    def panels(self) -> Panels:
        """The panels of output channels."""
        return Panels.of(self.product, self.tiling.product.panel)

    @contextmanager
    def tasks(self, frame: Frame) -> Iterator[Task]:
        """Loop over the tasks of this thread."""
        product, block = self.product, self.tiling.product
        repeat = max(segment.repeat for segment in product.column_segments(block.columns))
        column_tiles = ceil_div(repeat, block.blocks)
        panel_tiles = ceil_div(self.panels.total, block.panels)
        full = block.blocks * block.columns
        with frame.tasks((column_tiles, panel_tiles)) as (column_tile, panel_tile):
            first = column_tile * full
            if column_tiles == 1:
                pixels: Index = product.out_width
            else:
                pixels = tirx.Select(tirx.EQ(column_tile, column_tiles - 1), product.out_width - first, full)
            visit = Visit(product.out_width if column_tiles == 1 else full, -first)
            yield Task(self, first, pixels, visit, (column_tile, column_tiles), (panel_tile, panel_tiles))

    def multiply(self, registers: Registers, left: Operand, number: Index, block: Block) -> None:
        """Add product `number` of the block to the registers; `left` is over (batch, row, pixel, channel)."""
        channels, width = self.product.in_channels, sum(self.panels.widths)
        panel_base = block.panel * (self.tiling.count * channels * width)
        product_base = panel_base + number * channels * sum(block.widths)
        size = self.tiling.product.step_channels
        steps, rest = divmod(channels, size)
        with loop(steps) as step:
            share, now = self._share(block, panel_base, product_base, number, steps, step)
            share.prefetch(self.weight, now, block.start)
            self._fetch_ahead(block, number, steps, step)
            self._step(registers, left, block, product_base, step * size, size)
        for few in split_lanes(rest, size):
            self._step(registers, left, block, product_base, channels - rest, few)
            rest -= few

    def _share(
        self, block: Block, panel_base: Index, product_base: Index, number: Index, steps: int, step: Index
    ) -> tuple[WeightShare, Index]:
        """What a block fetches, and at which of its steps it is: all of one product, or of all products."""
        columns, elements = self.tiling.product.columns, self.product.in_channels * sum(block.widths)
        if self.tiling.by_product:
            return WeightShare(block.visit, columns, elements, steps, product_base), step
        count = self.tiling.count
        return WeightShare(block.visit, columns, count * elements, count * steps, panel_base), number * steps + step

    def _fetch_ahead(self, block: Block, number: Index, steps: int, step: Index) -> None:
        """Fetch in iteration number `step`, out of so many, of a block of a product for later kernels."""
        tiling, product = self.tiling.product, self.product
        products, pixels = self.panels.total * self.tiling.count, product.out_width
        elements = self.tiling.count * product.in_channels * product.out_channels
        first = (block.panel * self.tiling.count + number) * pixels
        for ahead in tiling.ahead:
            share = AheadShare(ahead, elements, products * pixels, first, tiling.columns, steps)
            share.prefetch(self.weight, step, block.start)

    def _step(
        self, registers: Registers, left: Operand, block: Block, product_base: Index, first: Index, channels: int
    ) -> None:
        """Add the products of `channels` input channels from `first` on."""
        inputs = [left.load_each((0, 0, block.start + index, first), channels) for index in range(len(registers))]
        for channel in range(channels):
            base, weights = product_base + (first + channel) * sum(block.widths), []
            for lanes, register in zip(block.widths, registers[0], strict=True):
                weights.append(T.Bind(repeated(self.weight[ramp(base, lanes)], register.copies)))
                base = base + lanes
            for own, column in zip(inputs, registers, strict=True):
                for register, weight in zip(column, weights, strict=True):
                    register.multiply_add(own[channel], weight)


@dataclass(frozen=True)
class Task:
    """Some blocks of pixels and some panels.

    Attributes:
        first: its first pixel. pixels: how many.
        column_tile, panel_tile: the number of its run of blocks and of its run of panels, out of how many.
    """

    products: Products
    first: Index
    pixels: Index
    visit: Visit
    column_tile: tuple[Index, int]
    panel_tile: tuple[Index, int]

    def for_each_panel(self, body: Callable[[Index, tuple[int, ...]], None]) -> None:
        """Call `body(panel, widths)`."""
        tile, tiles = self.panel_tile
        for_each_panel(self.products.panels, self.products.tiling.product.panels, tile, tiles, body)

    def for_each_block(self, panel: Index, widths: tuple[int, ...], body: Callable[[Block], None]) -> None:
        """Call `body(block)` for the blocks of one panel, whose vectors have `widths`."""
        tiling = self.products.tiling.product
        segments = self.products.product.column_segments(tiling.columns)

        def call(start: Index, segment: ColumnSegment) -> None:
            body(Block(start, segment.columns, panel, widths, self.visit, tiling.narrow))

        for_each_block(segments, tiling.blocks, *self.column_tile, call)


@dataclass(frozen=True)
class Block:
    """`columns` pixels from `start` on, times one panel, whose vectors have `widths`; the rest as in a tiling."""

    start: Index
    columns: int
    panel: Index
    widths: tuple[int, ...]
    visit: Visit
    narrow: Narrow

    def registers(self) -> Registers:
        """A register for each of its vectors."""
        copies = RegisterBlock(self.columns, self.widths, self.narrow).copies
        return [[Accumulator(lanes, copies=copies(lanes)) for lanes in self.widths] for _ in range(self.columns)]


TilingT = TypeVar("TilingT", bound=ProductTiling)


@dataclass(frozen=True)
class ProductStage(ABC, Generic[TilingT]):
    """Emits a convolution by an algorithm of several products.

    Attributes are those of `DenseStage`, and:

        lanes: the width of a full vector. scratch: memory for intermediate results.
        epilogue_cost: instructions that the sink takes for a vector.
    """

    convolution: Convolution
    tiling: TilingT
    lanes: int
    source: Operand
    weight: Expr
    bias: Expr | None
    sink: Sink
    scratch: Scratch
    epilogue_cost: int

    @staticmethod
    @abstractmethod
    def pack_weights(weight: FloatArray, convolution: Convolution, tiling: TilingT) -> NDArray[np.float32]:
        """`weight` [O, I, rows, columns] as the flat array that the kernel reads."""

    @staticmethod
    @abstractmethod
    def scratch_elements(convolution: Convolution, tiling: TilingT) -> int:
        """Elements of scratch that a thread needs."""

    @cached_property
    def product(self) -> Convolution:
        """One of the products."""
        return self.tiling.product_of(self.convolution)

    def emit(self, frame: Frame) -> None:
        """The whole convolution, shared by the threads of `frame`."""
        products = Products(self.product, self.tiling, self.weight)
        with products.tasks(frame) as task:
            self._prepare(task)

            def body(panel: Index, widths: tuple[int, ...]) -> None:
                self._panel(task, panel, widths)

            task.for_each_panel(body)

    @abstractmethod
    def _prepare(self, task: Task) -> None:
        """The left factors of the task's pixels."""

    @abstractmethod
    def _panel(self, task: Task, panel: Index, widths: tuple[int, ...]) -> None:
        """All products of one panel, whose vectors have `widths`, and its results."""

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """Not to be had: a product is of pixels from all over the image."""
        raise VerificationError(f"{self.tiling.algorithm} cannot be computed a few rows at a time")
