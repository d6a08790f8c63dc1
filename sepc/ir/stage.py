"""What a kernel computes, as plain numbers: the shapes that the cost model and the backends share.

Convolutions have a module of their own, `sepc.ir.convolution`; here are the other stages, and chains of stages. This
module imports neither torch nor TVM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.depth import Depth, Stacked
from sepc.ir.element import FLOAT32, Element, Typed


@dataclass(frozen=True)
class Pooling(Stacked):
    """A window reduction (average or maximum) per channel, regular or adaptive.

    An adaptive window of output row i spans the input rows from floor(i·H/OH) to ceil((i+1)·H/OH), columns alike;
    kernel, stride and padding are then unused. An average divides by `divisor` if given, else by the size of its
    window: clipped to the padded input if `include_padding`, else to the input itself.
    """

    batch: int
    in_height: int
    in_width: int
    out_height: int
    out_width: int
    channels: int
    maximum: bool
    adaptive: bool = False
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    include_padding: bool = True
    divisor: int = 0
    depth: Depth | None = None
    element: Element = FLOAT32

    @property
    def in_channels(self) -> int:
        """Channels, before as after."""
        return self.channels

    out_channels = in_channels

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of a full window."""
        if self.adaptive:
            return ceil_div(self.in_height, self.out_height), ceil_div(self.in_width, self.out_width)
        return self.kernel

    @property
    def is_global(self) -> bool:
        """Whether each image has one window, which is all of it."""
        planes = 1 if self.depth is None else self.depth.out_planes
        return self.adaptive and (planes, self.out_height, self.out_width) == (1, 1, 1)

    @property
    def flops(self) -> int:
        """One operation per input element that a window reads."""
        rows, columns = self.window
        return self.images * self.channels * self.out_height * self.out_width * rows * columns * self.window_planes

    @property
    def window_planes(self) -> int:
        """Planes of a full window."""
        if self.depth is None:
            return 1
        return ceil_div(self.depth.in_planes, self.depth.out_planes) if self.adaptive else self.depth.kernel


class _PerPixel(Typed):
    """What a stage that treats each pixel by itself has of a convolution: its window is one pixel.

    The last four extents are batch, height, width and channels.
    """

    extents: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Images."""
        return self.extents[-4]

    @property
    def out_height(self) -> int:
        """Rows."""
        return self.extents[-3]

    @property
    def out_width(self) -> int:
        """Columns."""
        return self.extents[-2]

    @property
    def out_channels(self) -> int:
        """Channels."""
        return self.extents[-1]

    @property
    def kernel(self) -> tuple[int, int]:
        """Rows and columns of the window: one pixel."""
        return 1, 1

    @property
    def padding(self) -> tuple[int, int]:
        """None."""
        return 0, 0

    in_height, in_width, in_channels = out_height, out_width, out_channels
    stride = dilation = kernel


@dataclass(frozen=True)
class Normalization(_PerPixel):
    """Layer normalisation over contiguous channels, the last of `extents`: (…, batch, height, width, channels).

    Without `subtract_mean` it is one by the root of the mean square (RMS).
    """

    extents: tuple[int, ...]
    epsilon: float
    subtract_mean: bool = True
    element: Element = FLOAT32

    @property
    def pixels(self) -> int:
        """Positions, over the whole batch."""
        return math.prod(self.extents[:-1])

    @property
    def channels(self) -> int:
        """What is normalised."""
        return self.extents[-1]

    @property
    def flops(self) -> int:
        """Mean, variance and scaling: about eight operations per element."""
        return 8 * math.prod(self.extents)


@dataclass(frozen=True)
class Softmax(Normalization):
    """Softmax over the contiguous channels of `extents`: passes over each row, as a layer normalisation takes them."""

    epsilon: float = 0.0


@dataclass(frozen=True)
class Map(_PerPixel):
    """An elementwise expression, or a copy, over an iteration space of `extents`, outermost first.

    Where it is a link of a chain, these are (batch, height, width, channels).
    """

    extents: tuple[int, ...]
    operations: int = 1
    element: Element = FLOAT32

    @property
    def flops(self) -> int:
        """Operations per element times elements."""
        return self.operations * math.prod(self.extents)


Stage = Convolution | Pooling | Normalization | Map


@dataclass(frozen=True)
class Chain:
    """Stages, each reading what the one before it writes, computed together over a moving window of rows."""

    links: tuple[Stage, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations of all links, no row computed twice."""
        return sum(link.flops for link in self.links)

    def rows_for(self, rows: int) -> tuple[int, ...]:
        """Output rows that each link computes for `rows` neighbouring rows of the last one's output."""
        needed = [rows]
        for before, link in zip(reversed(self.links[:-1]), reversed(self.links), strict=False):
            span = (needed[0] - 1) * link.stride[0] + (link.kernel[0] - 1) * link.dilation[0] + 1
            needed.insert(0, min(before.out_height, span))
        return tuple(needed)

    def ring_elements(self, step: int) -> tuple[int, ...]:
        """Elements of the ring buffers between the links, if the last one computes `step` rows per turn.

        A ring holds the rows that the next link reads in one turn, however many it computes at most.
        """
        rows = self.rows_for(step)[:-1]
        return tuple(
            count * link.out_width * link.out_channels for count, link in zip(rows, self.links[:-1], strict=True)
        )

    def ring_bytes(self, step: int) -> int:
        """Bytes of all of them."""
        elements = zip(self.ring_elements(step), self.links[:-1], strict=True)
        return sum(count * link.element.size_bytes for count, link in elements)
