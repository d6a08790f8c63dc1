"""Tensors of one value: nothing but their shape depends on the tensor that they are made like.

Pattern and equation.

    new_zeros(x, size), new_ones(x, size), new_full(x, size, v)    →    full(size, v)
    zeros_like(x), ones_like(x), full_like(x, v)                   →    full(shape of x, v)

What is computed from such a tensor and constants alone, as the masks of shifted windows are, is then a constant.

Preconditions. The result is stored densely, in the order of its dimensions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.ir.ops import arguments, aten, dtype, shape
from sepc.passes.rewriter import Rewriter, Rule


class AsFull(Rule[fx.Node]):
    """A tensor of one value, made like another, as one made of nothing."""

    values: ClassVar[dict[OpOverload, int | None]] = {
        aten.new_zeros.default: 0,
        aten.zeros_like.default: 0,
        aten.new_ones.default: 1,
        aten.ones_like.default: 1,
        aten.new_full.default: None,
        aten.full_like.default: None,
    }
    targets = tuple(values)

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | None:
        """Every such node; where strides would change, replacing it is rejected."""
        return node

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        """The same by ``full``."""
        value = next(value for target, value in self.values.items() if target is match.target)
        value = arguments(match)["fill_value"] if value is None else value
        size, device = list(shape(match)), torch.device("cpu")
        return build.call(aten.full.default, size, value, dtype=dtype(match), device=device)
