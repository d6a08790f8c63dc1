"""Normalisations, in the forms that have stages.

Pattern and equation. With w, b constants or absent,

    instance_norm(x, w, b, mean, variance)          →    batch_norm(x, w, b, mean, variance)
    layer_norm(x, [D₁, …, Dₖ], w, b), k = 2, 3, 4   →    group_norm(x, groups=1) · w + b
    rms_norm(x, [D₁, …, Dₖ], w), k > 1              →    rms_norm(flatten(x), [D₁ ⋯ Dₖ], flatten(w))
    x · rsqrt(mean(x², d) + ε), x / sqrt(…)         →    rms_norm(x, [size of d], ε=ε)
    softmax(x, d), rms_norm(x, [size of d])         →    the same over the last dimension, between two permutes

The leading dimensions of a layer normalisation become the images of a group normalisation, and D₁ (of two, D₂, so that
tokens with channels stay as they are) its channels. Products and sums with constants are computed where channels come
last, so that the constants lie in memory as they are read.

Preconditions. float32, which the stages compute in; an instance normalisation reads its statistics and does not update
them; softmax is over at least as many elements as fill a vector; there are views of x of the shapes needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from sepc.ir.layers import LayerNorm, RMSNorm, Softmax
from sepc.ir.ops import Binary, Mean, arguments, aten, dtype, is_op, shape
from sepc.passes.rewriter import Rejection, Rewriter, Rule
from sepc.passes.rules.storage import permuted, stored_as

MOST_IMAGE_DIMENSIONS = 4
"""Dimensions of an image of those that are normalised together, channels included."""


LEAST_MOVED = 8
"""Elements along a dimension for a softmax over it to be moved to the end: the stage's vectors lie along it.

On a Zen 5 core, TVM's kernel over a dimension of 2 (of 64×56×56) took 224 µs, the stage with two copies 785 µs; over 64
(of 28×28) these were 53 and 28 µs.
"""


class InstanceByStatistics(Rule[fx.Node]):
    """Instance normalisation by running statistics, which are the same for all instances: a batch normalisation."""

    targets = (aten.instance_norm.default,)

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | Rejection | None:
        """The node, if it reads statistics."""
        named = arguments(node)
        if named["running_mean"] is None:
            return None
        return Rejection("it updates its statistics") if named["use_input_stats"] else node

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        """The batch normalisation."""
        named = arguments(match)
        parameters = (named[name] for name in ("input", "weight", "bias", "running_mean", "running_var"))
        norm = build.call(aten.batch_norm.default, *parameters, False, named["momentum"], named["eps"], False)
        return stored_as(match, norm, build)


class LayerNormOfImages(Rule[fx.Node]):
    """Layer normalisation over several dimensions as a normalisation of one group of channels."""

    targets = LayerNorm.targets

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | Rejection | None:
        """The node, if it has the form above."""
        dimensions = len(LayerNorm.of(node).normalized_shape)
        if dimensions == 1 or dtype(node) != torch.float32:
            return None
        fits = dimensions <= MOST_IMAGE_DIMENSIONS
        return node if fits else Rejection(f"over more than {MOST_IMAGE_DIMENSIONS} dimensions")

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        """The group normalisation, with its dimensions as they were."""
        norm, sizes = LayerNorm.of(match), list(LayerNorm.of(match).normalized_shape)
        rank = len(sizes) + 1
        batched = [math.prod(shape(match)[: -len(sizes)]), *sizes]
        value = norm.input if list(shape(match)) == batched else build.call(aten.view.default, norm.input, batched)
        channel = 1 if len(sizes) > 2 else 2
        pixels = [dim for dim in range(1, rank) if dim != channel]
        image = permuted(value, [0, channel, *pixels], build)
        last = [0, *range(2, rank), 1]
        result = permuted(build.call(aten.group_norm.default, image, 1, None, None, norm.eps), last, build)
        inside = [dim - 1 for dim in (*pixels, channel)]
        for parameter, operation in ((norm.weight, aten.mul.Tensor), (norm.bias, aten.add.Tensor)):
            if parameter is not None:
                result = build.call(operation, result, permuted(parameter, inside, build))
        order = [0, *pixels, channel]
        result = permuted(result, [order.index(dim) for dim in range(rank)], build)
        # Stored before it is viewed, so that this belongs to the same region.
        dense = build.call(aten.clone.default, result, memory_format=torch.contiguous_format)
        return build.call(aten.view.default, dense, list(shape(match)))


class FlatRMSNorm(Rule[fx.Node]):
    """RMS normalisation over several dimensions as one over as many elements."""

    targets = RMSNorm.targets

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | None:
        """The node, if it has the form above."""
        several = len(RMSNorm.of(node).normalized_shape) > 1
        return node if several and dtype(node) == torch.float32 else None

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        """The normalisation of the flattened tensor, and the view of it."""
        norm = RMSNorm.of(match)
        size = math.prod(norm.normalized_shape)
        flat = build.call(
            aten.view.default, norm.input, [*shape(match)[: len(shape(match)) - len(norm.normalized_shape)], size]
        )
        weight = None if norm.weight is None else build.call(aten.view.default, norm.weight, [size])
        return build.call(
            aten.view.default, build.call(aten.rms_norm.default, flat, [size], weight, norm.eps), list(shape(match))
        )


@dataclass(frozen=True)
class _MeanSquare:
    """What is divided by the root of its mean square along `dim`, plus `eps`."""

    node: fx.Node
    input: fx.Node
    dim: int
    eps: float


class RMSNormInParts(Rule[_MeanSquare]):
    """RMS normalisation that is written as a product with an inverse root, or a quotient by a root."""

    targets = (aten.mul.Tensor, aten.div.Tensor)

    def match(self, node: fx.Node, module: fx.GraphModule) -> _MeanSquare | None:
        """The value and its root, if `node` has the form above."""
        binary, inverse = Binary.of(node), is_op(node, aten.mul.Tensor)
        if dtype(node) != torch.float32 or not isinstance(binary.other, fx.Node):
            return None
        pairs = [(binary.input, binary.other), (binary.other, binary.input)]
        for value, root in pairs if inverse else pairs[:1]:
            if is_op(root, aten.rsqrt.default if inverse else aten.sqrt.default):
                found = _mean_square(root.all_input_nodes[0])
                if found is not None and found[0] is value:
                    return _MeanSquare(node, *found)
        return None

    def rewrite(self, match: _MeanSquare, build: Rewriter) -> fx.Node:
        """The normalisation, between permutes where it is not along the last dimension."""
        size = shape(match.input)[match.dim]
        moved, back = _along_last(match.input, match.dim, build)
        norm = build.call(aten.rms_norm.default, moved, [size], None, match.eps)
        return stored_as(match.node, permuted(norm, back, build), build)


class SoftmaxAlongLast(Rule[fx.Node]):
    """Softmax over the last dimension, between two permutes: over channels, which come last in memory, that is free."""

    targets = (aten.softmax.int,)

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | Rejection | None:
        """The node, if it is over another dimension."""
        rank, dim = len(shape(node)), Softmax.of(node).dim
        if rank == 1 or dim == rank - 1 or dtype(node) != torch.float32 or arguments(node)["dtype"] is not None:
            return None
        return node if shape(node)[dim] >= LEAST_MOVED else Rejection(f"over fewer than {LEAST_MOVED} elements")

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        """The softmax with its permutes."""
        softmax = Softmax.of(match)
        moved, back = _along_last(softmax.input, softmax.dim, build)
        return stored_as(match, permuted(build.call(aten.softmax.int, moved, len(back) - 1), back, build), build)


def _along_last(value: fx.Node, dim: int, build: Rewriter) -> tuple[fx.Node, list[int]]:
    """`value` with dimension `dim` moved to the end, and the order that moves it back."""
    rank = len(shape(value))
    order = [*(other for other in range(rank) if other != dim), dim]
    return permuted(value, order, build), [order.index(other) for other in range(rank)]


def _mean_square(node: fx.Node) -> tuple[fx.Node, int, float] | None:
    """x, d and ε of mean(x², d) + ε."""
    eps = 0.0
    if is_op(node, aten.add.Tensor) and isinstance(Binary.of(node).other, int | float):
        sum_ = Binary.of(node)
        node, eps = sum_.input, float(arguments(node)["other"]) * sum_.alpha
    if not Mean.matches(node) or arguments(node)["dtype"] is not None:
        return None
    mean = Mean.of(node)
    value = _squared(mean.input)
    return (value, mean.dims[0], eps) if value is not None and len(mean.dims) == 1 and mean.keepdim else None


def _squared(node: fx.Node) -> fx.Node | None:
    """x of x²."""
    if is_op(node, aten.square.default):
        return node.all_input_nodes[0]
    factors = node.args if is_op(node, aten.mul.Tensor) else ()
    same = len(factors) == 2 and factors[0] is factors[1]
    return node.all_input_nodes[0] if same else None
