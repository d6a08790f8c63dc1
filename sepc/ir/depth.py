"""Images, and stacks of images: what stages over planes have."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sepc.ir.element import Typed


@dataclass(frozen=True)
class Depth:
    """The third dimension of 3-D convolutions and poolings: images are then stacks of planes.

    `kernel`, `stride`, `padding` (in front) and `dilation` are what rows and columns have too.
    """

    in_planes: int
    out_planes: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def uses(self) -> int:
        """Pairs of an output plane and a kernel plane whose input plane exists."""
        reads = (
            plane * self.stride - self.padding + tap * self.dilation
            for plane in range(self.out_planes)
            for tap in range(self.kernel)
        )
        return sum(0 <= plane < self.in_planes for plane in reads)


class Stacked(Typed):
    """What a stage over images, or over stacks of planes, has."""

    batch: int
    depth: Depth | None

    @property
    def leading(self) -> tuple[int, ...]:
        """Extents of the results before rows, columns and channels: (batch), or (batch, planes)."""
        return (self.batch,) if self.depth is None else (self.batch, self.depth.out_planes)

    @property
    def images(self) -> int:
        """2-D images of results."""
        return math.prod(self.leading)
