"""Normalisation over the pixels of an image, as plain numbers: of groups of channels, of each channel, of all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sepc.ir.element import FLOAT32, Element, Typed


@dataclass(frozen=True)
class GroupNormalization(Typed):
    """Normalisation of every group of neighbouring channels over all pixels of an image.

    Attributes:
        extents: (images, pixels…, channels).
        groups: of channels; one for the whole image, as many as channels for an instance normalisation.
        epsilon: what is added to the variance. element: type of what is read and written.
    """

    extents: tuple[int, ...]
    groups: int
    epsilon: float
    element: Element = FLOAT32

    @property
    def images(self) -> int:
        """Images, each normalised by itself."""
        return self.extents[0]

    @property
    def pixels(self) -> int:
        """Positions of one image."""
        return math.prod(self.extents[1:-1])

    @property
    def channels(self) -> int:
        """Channels, over all groups."""
        return self.extents[-1]

    @property
    def group_channels(self) -> int:
        """Channels of one group."""
        return self.channels // self.groups

    @property
    def flops(self) -> int:
        """Mean, variance and scaling: about eight operations per element."""
        return 8 * math.prod(self.extents)
