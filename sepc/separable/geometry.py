"""A convolution without its weights, as plain numbers: what a form takes apart, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import nn

if TYPE_CHECKING:
    import torch

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS: Final[tuple[Callable[..., Layer], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers by their number of spatial dimensions, from 1."""


@dataclass(frozen=True)
class Geometry:
    """A convolution of any number of spatial dimensions, as PyTorch's layers have it."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    @staticmethod
    def of(layer: Layer) -> Geometry:
        """The geometry of `layer`."""
        padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        if padding == "valid":
            padding = (0,) * len(layer.kernel_size)
        sizes = tuple(layer.kernel_size), tuple(layer.stride), padding, tuple(layer.dilation)
        return Geometry(layer.in_channels, layer.out_channels, *sizes, layer.groups, layer.padding_mode)

    @property
    def taps(self) -> int:
        """Products per output and input channel."""
        return math.prod(self.kernel)

    @property
    def group_inputs(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @property
    def group_outputs(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the layer's weight, [outputs, inputs of a group, kernel...]."""
        return (self.out_channels, self.group_inputs, *self.kernel)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The pixels of the result for an image of `size` pixels, in each spatial dimension."""
        if self.padding == "same":
            return tuple(size)
        assert not isinstance(self.padding, str), "the other one, 'valid', is zeros"
        numbers = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((one + 2 * pad - step * (taps - 1) - 1) // stride + 1 for one, taps, stride, pad, step in numbers)

    def multiply_adds(self, size: Sequence[int]) -> int:
        """Multiply-adds for one image of `size` pixels."""
        return math.prod(self.output_size(size)) * self.out_channels * self.group_inputs * self.taps

    def layer(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
        """The layer with that weight and bias, on the weight's device."""
        made = LAYERS[len(self.kernel) - 1](
            self.in_channels,
            self.out_channels,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias is not None,
            self.padding_mode,
            device="meta",
            dtype=weight.dtype,
        )
        made.weight = nn.Parameter(weight)
        if bias is not None:
            made.bias = nn.Parameter(bias)
        return made


def pointwise(inputs: int, outputs: int, dimensions: int) -> Geometry:
    """A convolution of one tap."""
    ones, zeros = (1,) * dimensions, (0,) * dimensions
    return Geometry(inputs, outputs, ones, ones, zeros, ones)


def in_groups(factor: Geometry, groups: int) -> Geometry:
    """So many copies of `factor` beside each other, each with channels of its own."""
    return Geometry(
        factor.in_channels * groups,
        factor.out_channels * groups,
        factor.kernel,
        factor.stride,
        factor.padding,
        factor.dilation,
        factor.groups * groups,
        factor.padding_mode,
    )
