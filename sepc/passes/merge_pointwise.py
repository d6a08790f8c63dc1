"""merge-pointwise: a 1x1 convolution right before or after a convolution becomes a part of it.

Pattern: two convolutions in a row, in float32 and of one group each. One of them is pointwise: its kernel is 1x1, its
stride 1, and it does not pad. In float64, W₂W₁ being a product of matrices over channels for every tap of the other,

    W₂∗(W₁∗x + b₁) + b₂  =  (W₂W₁)∗x + (Σ W₂b₁ + b₂)                        Σ over the taps of W₂

Preconditions. The first has no other user; all weights are constants; the merged convolution takes no more
multiplications than both together. If the second one pads, then b₁ = 0, since it pads with zeros, not with b₁. Batch
norms between the two hinder this, so they are folded before.

    conv1x1 (16 → 64) → conv1x1 (64 → 16)         becomes    conv1x1' (16 → 16)
    conv3x3 (16 → 32) → conv1x1 (32 → 32)         becomes    conv3x3' (16 → 32)
    conv1x1 (64 → 16) → conv1x1 (16 → 64)         stays, as 64·64 is more than 64·16 + 16·64
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from sepc.ir.layers import Conv
from sepc.ir.ops import constant, dtype, is_constant, shape
from sepc.ir.types import fake_mode
from sepc.passes.fold_batch_norm import build_layer
from sepc.passes.manager import PassContext
from sepc.passes.rewriter import Rejection, Rewriter, replace

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True)
class MergePointwise:
    """The pass. Convolutions are visited in order, so that a chain of several becomes one."""

    name: ClassVar[str] = "merge-pointwise"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Merge what it can in `graph_module`; returns whether it changed."""
        changed, mode = False, fake_mode(graph_module)
        for node in list(graph_module.graph.nodes):
            if not (Conv.matches(node) and Conv.matches(Conv.of(node).input) and dtype(node) == torch.float32):
                continue
            source = Conv.of(node).input
            build = Rewriter(graph_module, self.name, mode, node, (source, node))
            rejection = merge(source, node, build)
            changed |= rejection is None
            if rejection is None or rejection.near:
                message = rejection.reason if rejection else f"one convolution with {source.name}"
                context.note(self.name, node, message, taken=rejection is None)
        return changed


def merge(source: fx.Node, node: fx.Node, build: Rewriter) -> Rejection | None:
    """Replace `node`, a convolution of the convolution `source`, by one of the input of `source`."""
    first, second = Conv.of(source), Conv.of(node)
    # The one that gives the merged convolution its kernel, stride and padding.
    wide = first if is_plain_pointwise(second) else second
    if first.groups != 1 or second.groups != 1 or not (wide is first or is_plain_pointwise(first)):
        return Rejection("they are no pair of a pointwise and another convolution", near=False)
    if len(source.users) > 1:
        return Rejection(f"{source.name} has {len(source.users)} users")
    if not all(one is None or is_constant(one) for one in (first.weight, first.bias, second.weight, second.bias)):
        return Rejection(f"the weights of {source.name} or its own are computed at run time")
    apart = sum(math.prod(shape(one)[2:]) * math.prod(shape(Conv.of(one).weight)) for one in (source, node))
    merged = math.prod(shape(node)[2:]) * first.in_channels * second.out_channels * math.prod(wide.kernel)
    if merged > apart:
        return Rejection(f"with {source.name} merged it would take {merged} multiplications instead of {apart}")
    if any(second.padding) and first.bias is not None and bool(constant(build.graph_module, first.bias).any()):
        return Rejection(f"it pads with zeros after the bias of {source.name}")
    weight, bias = product(first, second, build)
    return replace(node, build, lambda: build_layer(build, wide, first.input, weight, bias))


def is_plain_pointwise(layer: Conv) -> bool:
    """Whether `layer` is a product of matrices at each pixel, and has as many pixels as its input."""
    return layer.is_pointwise and not any(layer.padding) and all(one == 1 for one in layer.stride)


def product(first: Conv, second: Conv, build: Rewriter) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of `second` after `first`, in float64; one of them is pointwise."""
    inner, outer = (constant(build.graph_module, one.weight).double() for one in (first, second))
    inner_bias, outer_bias = (
        torch.zeros(one.out_channels, dtype=torch.float64)
        if one.bias is None
        else constant(build.graph_module, one.bias).double()
        for one in (first, second)
    )
    # A kernel of 1x1 broadcasts over the taps of the other. Strides of the weights decide on those of the result.
    weight = torch.einsum("om...,mi...->oi...", outer, inner).clone(memory_format=torch.contiguous_format)
    taps = tuple(range(2, outer.dim()))
    return weight, outer_bias + outer.sum(taps) @ inner_bias
