"""What a block fetches while it runs, bit by bit: the next panel's weights, those of later kernels, and tensors."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from sepc.backends.stages.vector import Expr, Index, Operand, element_bytes, line_elements, prefetch
from sepc.cost_model.tiling import Ahead
from sepc.ir.arithmetic import ceil_div

# How far ahead of its use a packed weight is fetched where only one block reads it. Weights of a whole network stream
# from the last level or DRAM, and hardware prefetchers stop at each 4 KiB page. Measured on a Zen 5 core with cold
# weights, 49×160→960: 175 GFLOP/s without, 217 with 4 KiB, 227 with 8 and with 16 KiB.
# Panels that several blocks read are fetched while the panel before is in use, each block fetching its share: fetching
# in bursts took 4 % of the time of ConvNeXt-T (114 MB of weights), 2 % of ResNet-50's and of MobileNetV2's.
PREFETCH_BYTES = 8192
# Of such a stream, one line of so many is fetched: hardware brings the others once it has been shown where to. Fully
# connected layers of 1280 channels one after the other, one row, on an Intel Emerald Rapids, fetching every line,
# every second, every fourth, none: 1, 0.95, 0.90, 0.96 of the time. Fetches take turns with loads.
STREAM_LINES = 4


@dataclass(frozen=True)
class Visit:
    """Where a block stands among those that read a panel one after the other, before the next panel's turn.

    Attributes:
        pixels: output pixels of all those blocks. first: how many pixels precede column 0 of the block's row.
    """

    pixels: int
    first: Index


@dataclass(frozen=True)
class WeightShare:
    """The weights that a block fetches while it runs: its share of the next panel's.

    Behind the last panel come the weights of the next kernel. A block that has its panel to itself fetches that one, a
    little ahead of its use.

    Attributes:
        visit: the place of the block. columns: output columns of a block. elements: weights of a panel.
        steps: innermost iterations of a block, which read the panel in even parts. panel: where that begins.
    """

    visit: Visit
    columns: int
    elements: int
    steps: int
    panel: Index

    def prefetch(self, weight: Expr, step: Index, start: Index) -> None:
        """Fetch in iteration number `step` of the block at column `start`."""
        lines = line_elements(weight)
        if self.visit.pixels <= self.columns:
            elements_per_step = ceil_div(self.elements, self.steps)
            first = self.panel + min(self.elements, PREFETCH_BYTES // element_bytes(weight))
            lines *= STREAM_LINES
        else:
            elements_per_pixel = ceil_div(self.elements, self.visit.pixels)
            elements_per_step = ceil_div(elements_per_pixel * self.columns, self.steps)
            first = self.panel + self.elements + (self.visit.first + start) * elements_per_pixel
        for line in range(0, elements_per_step, lines):
            prefetch(weight, first + step * elements_per_step + line)


@dataclass(frozen=True)
class AheadShare:
    """A block's share of what its kernel fetches for later ones, in the order in which blocks come.

    Attributes:
        ahead: all of it. elements: the kernel's own weights. pixels: pairs of a panel and an output pixel, of the whole
            kernel. first: how many of these precede column 0 of the block's row. columns, steps: as of `WeightShare`.
    """

    ahead: Ahead
    elements: int
    pixels: int
    first: Index
    columns: int
    steps: int

    def prefetch(self, weight: Expr, step: Index, start: Index) -> None:
        """Fetch in iteration number `step` of the block at column `start`; into the second level and those behind it,
        as it would push what the block needs out of the first.
        """
        size = element_bytes(weight)
        per_pixel = ceil_div(ceil_div(self.ahead.fetched_bytes, size), self.pixels)
        per_step = ceil_div(per_pixel * self.columns, self.steps)
        first = self.elements + self.ahead.skipped_bytes // size + (self.first + start) * per_pixel
        for line in range(0, per_step, line_elements(weight)):
            prefetch(weight, first + step * per_step + line, outer=True)


@dataclass(frozen=True)
class Fetched:
    """A tensor of which blocks fetch their lines, for reading or to `write` them."""

    operand: Operand
    write: bool = False


@dataclass(frozen=True)
class PixelShare:
    """Lines of a tensor's pixels that a block fetches, evenly over its steps; nothing where channels lie apart.

    Attributes:
        fetched: the tensor. position: of the first pixel and channel, along the dimensions of the tensor.
        pixels: how many pixels, so many columns `apart`. channels: of each of them.
        steps: innermost iterations of a block.
    """

    fetched: Fetched
    position: tuple[Index, ...]
    pixels: int
    channels: int
    steps: int
    apart: int = 1

    def prefetch(self, step: Index) -> None:
        """Fetch in iteration number `step`."""
        operand, line = self.fetched.operand, line_elements(self.fetched.operand.buffer)
        if not operand.is_by_pixels:
            return
        per_pixel = ceil_div(self.channels, line)
        lines = self.pixels * per_pixel
        per_step = ceil_div(lines, self.steps)
        *outer, column, channel = self.position
        for extra in range(per_step):
            # Fewer lines than steps: each of them several times, as a loop without branches has it.
            number = step * per_step + extra if per_step > 1 else _quotient(step * lines, self.steps)
            pixel = _quotient(number, per_pixel)
            first = channel + (number - pixel * per_pixel) * line
            place = (*outer, column + pixel * self.apart, first)
            operand.prefetch(place, 1, write=self.fetched.write)


def _quotient(dividend: Index, divisor: int) -> Index:
    return dividend // divisor if isinstance(dividend, int) else tirx.truncdiv(dividend, divisor)
