"""Convolutions as plain numbers: the stage that everything here is about.

Whatever ATen op it came from, a convolution is described in one canonical form: it maps `[batch, in_height, in_width,
in_channels]` to `[batch, out_height, out_width, out_channels]`. A linear layer is a 1×1 convolution over one row whose
columns are all its leading dimensions; a 1-D convolution has one row. This module imports neither torch nor TVM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sepc.ir.arithmetic import ceil_div
from sepc.ir.depth import Depth, Stacked
from sepc.ir.element import FLOAT32, Element

Mixing = Literal["nothing", "tiles", "pixels"]
"""What fast algorithms may add up on the way to results of their own: nothing, the tiles of a map by Winograd's, or any
pixels of a product by Strassen's as well. Rounding errors and what is not finite spread as far.
"""

WINOGRAD_TAPS = 3
"""Rows and columns of the kernels that have a form by Winograd's algorithm."""


LEAST_BLOCKS = 3
"""Blocks of a long sum in float16, at least: LLVM 22 unrolls a loop over two, and spills registers inside (10 accesses
to the stack per channel for 320→1280 in blocks of 13×2 vectors, 6 for 384→96 in blocks of 6×4; none with three)."""


@dataclass(frozen=True)
class ColumnSegment:
    """A run of output columns computed by one unrolled block of code, `repeat` times over.

    Attributes:
        start: the first output column.
        columns: output columns per block.
        repeat: number of consecutive blocks.
        interior: every tap of every column is inside the input, so that no column needs a check.
    """

    start: int
    columns: int
    repeat: int
    interior: bool


@dataclass(frozen=True)
class Convolution(Stacked):
    """A convolution, pointwise, dense, grouped or depthwise.

    `padding` is (top, left); kernel, stride and dilation are (rows, columns). A 3-D one is a 2-D one of every plane,
    that adds up over the planes of its kernel, given by `depth`.
    """

    batch: int
    in_height: int
    in_width: int
    out_height: int
    out_width: int
    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    depth: Depth | None = None
    element: Element = FLOAT32

    @property
    def kernel_rows(self) -> int:
        """Rows of the kernel window, those of all its planes together."""
        return self.kernel[0] * (self.depth.kernel if self.depth else 1)

    @property
    def group_in(self) -> int:
        """Input channels that one output channel reads."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        """Positions of the kernel window."""
        return self.kernel_rows * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Output positions, over the whole batch."""
        return self.images * self.out_height * self.out_width

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two."""
        return 2 * self.pixels * self.out_channels * self.group_in * self.taps

    @property
    def sums_in_blocks(self) -> bool:
        """Whether its sums are too long to be added up in its own type: see `Element.longest_sum`."""
        return 0 < self.element.longest_sum < self.taps * self.group_in

    @property
    def row_sums(self) -> tuple[tuple[int, int, int], ...]:
        """The products of a kernel row, in blocks that can be added up in the type of the numbers.

        Each is (columns of the kernel, runs of input channels for each of these, channels of a run): whole columns or,
        where one is too long a sum by itself, even parts of it; the last run may be shorter.
        """
        longest = self.element.longest_sum or self.taps * self.group_in
        if self.group_in > longest:
            parts = max(LEAST_BLOCKS, ceil_div(self.group_in, longest))
            return ((1, parts, ceil_div(self.group_in, parts)),) * self.kernel[1]
        together = min(self.kernel[1], longest // self.group_in)
        full, rest = divmod(self.kernel[1], together)
        return ((together, 1, self.group_in),) * full + (((rest, 1, self.group_in),) if rest else ())

    @property
    def halves(self) -> Convolution | None:
        """Half the pixels (rounded up), half the input and half the output channels; None where that is no product.

        A matrix product can be had from seven products of its halves: see `sepc.backends.stages.strassen`. In float32
        only: its intermediate sums lose digits that float16 does not have to spare; so do Winograd's.
        """
        single_row = self.batch == self.out_height == self.taps == self.groups == 1 and self.depth is None
        in_place = self.stride == (1, 1) and self.padding == (0, 0) and self.in_width == self.out_width
        even = self.in_channels % 2 == 0 and self.out_channels % 2 == 0
        if not (single_row and in_place and even and self.out_width > 1 and self.element == FLOAT32):
            return None
        width = ceil_div(self.out_width, 2)
        return Convolution(1, 1, width, 1, width, self.in_channels // 2, self.out_channels // 2)

    def winograd_tiles(self, outputs: int) -> tuple[int, int]:
        """How many tiles of `outputs`×`outputs` results cover an image, down and across."""
        return ceil_div(self.out_height, outputs), ceil_div(self.out_width, outputs)

    def winograd_product(self, outputs: int) -> Convolution | None:
        """The matrix products whose pixels are tiles of `outputs`×`outputs` results; None where Winograd's algorithm
        does not apply: see `sepc.backends.stages.winograd`.
        """
        taps = (WINOGRAD_TAPS, WINOGRAD_TAPS)
        options = (self.kernel, self.stride, self.dilation, self.groups, self.depth)
        if options != (taps, (1, 1), (1, 1), 1, None) or self.element != FLOAT32:
            return None
        tiles = self.batch * math.prod(self.winograd_tiles(outputs))
        return Convolution(1, 1, tiles, 1, tiles, self.in_channels, self.out_channels)

    def lanewise(self, lanes: int) -> bool:
        """Whether each vector lane needs an input channel of its own (depthwise, or groups narrower than a vector)."""
        return self.groups > 1 and self.group_out < lanes and lanes % self.group_out == 0

    def column_valid(self, column: int, tap: int) -> bool:
        """Whether kernel column `tap` of output `column` falls inside the input."""
        return 0 <= column * self.stride[1] - self.padding[1] + tap * self.dilation[1] < self.in_width

    def column_segments(self, block: int) -> tuple[ColumnSegment, ...]:
        """Cover the output row by blocks of `block` columns: the border, the interior as a loop, then the rest."""
        block = min(block, self.out_width)
        last_tap = self.kernel[1] - 1
        first_inside = ceil_div(self.padding[1], self.stride[1])
        reach = self.in_width - 1 + self.padding[1] - last_tap * self.dilation[1]
        end_inside = min(self.out_width, reach // self.stride[1] + 1) if reach >= 0 else 0
        segments: list[ColumnSegment] = []
        start = 0
        while start < min(first_inside, self.out_width):
            columns = min(block, self.out_width - start)
            segments.append(ColumnSegment(start, columns, 1, False))
            start += columns
        repeat = max(0, (end_inside - start) // block)
        if repeat:
            segments.append(ColumnSegment(start, block, repeat, True))
            start += repeat * block
        while start < self.out_width:
            columns = min(block, self.out_width - start)
            segments.append(ColumnSegment(start, columns, 1, start + columns <= end_inside))
            start += columns
        return tuple(segments)
