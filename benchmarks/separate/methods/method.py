"""What a method is: a network with a strength becomes a smaller one; and how layers of a network are replaced."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from sepc.separable import geometry
from sepc.separable.geometry import Geometry


class Method(ABC):
    """A way to make networks faster, with one parameter.

    Attributes:
        title: how it is called in tables.
    """

    name: str
    title: ClassVar[str]

    @abstractmethod
    def compress(self, model: nn.Module, example: torch.Tensor, strength: float) -> nn.Module:
        """A smaller copy of `model`, which takes inputs like `example`.

        A `strength` of 0 leaves it as it is; with 1 it is as small as this method can make it.
        """


def with_replaced(model: nn.Module, replacement: Callable[[nn.Conv2d], nn.Module | None]) -> nn.Module:
    """A copy of `model` with what `replacement` gives for its convolutions of one group, where it gives anything."""
    result = copy.deepcopy(model)
    for path, module in list(result.named_modules()):
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            found = replacement(module)
            if found is not None:
                parent, _, name = path.rpartition(".")
                setattr(result.get_submodule(parent), name, found)
    return result


def sequence(conv: nn.Conv2d, spatial: torch.Tensor, groups: int, pointwise: torch.Tensor) -> nn.Sequential:
    """In place of `conv`: k×k with weight `spatial` and so many groups, then 1×1 with weight `pointwise` [O, m]."""
    inner = len(spatial)
    whole = Geometry.of(conv)
    first = replace(whole, out_channels=inner, groups=groups).layer(spatial, None)
    last = geometry.pointwise(inner, conv.out_channels, 2).layer(pointwise[:, :, None, None], conv.bias)
    return nn.Sequential(first, last)


def weights_of(conv: nn.Conv2d, inner: int, groups: int) -> tuple[int, int]:
    """How many weights `conv` has, and the `sequence` in its place: in proportion to their multiply-adds per pixel."""
    dense = conv.weight.numel()
    return dense, dense // conv.out_channels * inner // groups + inner * conv.out_channels
