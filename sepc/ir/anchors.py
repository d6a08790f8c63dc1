"""What the first operator of a region is: its stage, as numbers, and the space that it iterates over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from sepc.ir import layers, ops
from sepc.ir.convolution import Convolution
from sepc.ir.depth import Depth
from sepc.ir.elementwise import OPERATIONS
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Axis, Interleaved, interleave
from sepc.ir.region import computations, row_means
from sepc.ir.stage import Map, Normalization, Pooling, Softmax, Stage

IMAGE_RANKS = (3, 4, 5)
"""Dimensions of what convolutions and poolings work on, batch and channels included."""


class UnsupportedRegionError(Exception):
    """A region that no stage of ours covers; its message is the reason. Callers fall back, users never see it."""


def anchor_of(region: fx.GraphModule) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The first operator of a region that is no padding, and the nodes to evaluate elementwise.

    These are the ones after it, and it too if it is elementwise itself.
    """
    nodes = [node for node in computations(region) if not ops.Pad.matches(node) and node is not row_means(region)]
    return nodes[0], tuple(nodes if nodes[0].target in OPERATIONS else nodes[1:])


def unpadded(tensor: fx.Node) -> fx.Node:
    """`tensor`, or what it was before it was padded."""
    return ops.Pad.of(tensor).input if ops.Pad.matches(tensor) else tensor


def channel_axes(rank: int) -> tuple[int, ...]:
    """Iteration dimension of each logical dimension of an [N, C, (H,) W] or [N, C, D, H, W] tensor.

    Iteration dimensions are (batch, row, column, channel), or (batch, plane, row, column, channel).
    """
    return {3: (0, 3, 2), 4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}[rank]


Space = tuple[tuple[int, ...], tuple[int, ...], Stage | Interleaved | GroupNormalization]
OVER_ROWS = (layers.Linear, layers.Product, layers.Softmax, layers.LayerNorm, layers.RMSNorm)
"""Operators over the last dimension, to which all others are alike."""


def anchor_space(anchor: fx.Node, elementwise: bool) -> Space:
    """Extents of the iteration space, which of its dimensions each of the anchor's result runs along, and the stage."""
    extents, axes, stage = _space(anchor, elementwise)
    return extents, axes, stage.of(element) if (element := ops.element(anchor)) != stage.element else stage


def _space(anchor: fx.Node, elementwise: bool) -> Space:
    """The same, of float32."""
    shape = ops.shape(anchor)
    plain = tuple(range(len(shape)))
    if elementwise:
        return shape, plain, Map(shape)
    if not any(accessor.matches(anchor) for accessor in OVER_ROWS):
        return _over_images(anchor)
    return shape, plain, _over_rows(anchor)


def _over_rows(anchor: fx.Node) -> Stage:
    """The stage of an operator over the last dimension; all others are pixels of one row."""
    shape = ops.shape(anchor)
    pixels = math.prod(shape[:-1])
    if layers.Linear.matches(anchor):
        linear = layers.Linear.of(anchor)
        inputs, outputs = ops.shape(linear.weight)[1], shape[-1]
        return Convolution(1, 1, pixels, 1, pixels, inputs, outputs)
    if layers.Product.matches(anchor):
        inner = ops.shape(layers.Product.of(anchor).left)[-1]
        return Convolution(1, 1, pixels, 1, pixels, inner, shape[-1])
    if layers.Softmax.matches(anchor):
        return Softmax((1, 1, pixels, shape[-1]))
    is_rms = layers.RMSNorm.matches(anchor)
    norm = layers.RMSNorm.of(anchor) if is_rms else layers.LayerNorm.of(anchor)
    if len(norm.normalized_shape) != 1:
        raise UnsupportedRegionError("a normalisation over more than the last dimension")
    return Normalization((1, 1, pixels, shape[-1]), norm.eps, subtract_mean=not is_rms)


def _over_images(anchor: fx.Node) -> Space:
    """The same as `anchor_space` for an operator over images, whose channels run innermost."""
    shape = ops.shape(anchor)
    if len(shape) not in IMAGE_RANKS:
        raise UnsupportedRegionError(f"{anchor.target} of a tensor with {len(shape)} dimensions")
    axes = channel_axes(len(shape))
    if layers.ConvTranspose.matches(anchor):
        transposed = _transposed(anchor)
        return transposed.extents, axes, transposed
    if layers.GroupNorm.matches(anchor):
        norm = layers.GroupNorm.of(anchor)
        extents = (shape[0], *(1,) * (4 - len(shape)), *shape[2:], shape[1])
        return extents, axes, GroupNormalization(extents, norm.groups, norm.eps)
    stage = _convolution(anchor) if layers.Conv.matches(anchor) else _pooling(anchor)
    return (*stage.leading, stage.out_height, stage.out_width, shape[1]), axes, stage


def _two(values: Sequence[int], fill: int) -> tuple[int, int]:
    """(rows, columns) of a spatial option; a 1-D one has one row, of a 3-D one these are the last two."""
    return (fill, values[0]) if len(values) == 1 else (values[-2], values[-1])


def _depth(source: Sequence[int], out: Sequence[int], *options: Sequence[int]) -> Depth | None:
    """The third dimension of an [N, C, D, H, W] tensor under a window; None of fewer dimensions.

    `options` are kernel, stride, padding and dilation, or nothing.
    """
    return Depth(source[2], out[2], *(option[0] for option in options)) if len(source) == 5 else None


def _convolution(anchor: fx.Node) -> Convolution:
    conv = layers.Conv.of(anchor)
    source, out = ops.shape(unpadded(conv.input)), ops.shape(anchor)
    if len(source) != len(out):
        raise UnsupportedRegionError("a convolution without a batch dimension")
    before = ops.Pad.of(conv.input).before[2:] if ops.Pad.matches(conv.input) else (0,) * len(conv.padding)
    padding = [own + outer for own, outer in zip(conv.padding, before, strict=True)]
    in_height, in_width = _two(source[2:], 1)
    out_height, out_width = _two(out[2:], 1)
    return Convolution(
        out[0],
        in_height,
        in_width,
        out_height,
        out_width,
        conv.in_channels,
        conv.out_channels,
        conv.groups,
        _two(conv.kernel, 1),
        _two(conv.stride, 1),
        _two(padding, 0),
        _two(conv.dilation, 1),
        _depth(source, out, conv.kernel, conv.stride, padding, conv.dilation),
    )


def _transposed(anchor: fx.Node) -> Interleaved:
    conv = layers.ConvTranspose.of(anchor)
    source, out = ops.shape(conv.input), ops.shape(anchor)
    if len(source) != len(out) or len(out) != len(conv.kernel) + 2:
        raise UnsupportedRegionError("a transposed convolution without a batch dimension")
    options = zip(source[2:], out[2:], conv.kernel, conv.stride, conv.padding, conv.dilation, strict=True)
    return interleave(out[0], conv.in_channels, conv.out_channels, conv.groups, [Axis(*option) for option in options])


def _pooling(anchor: fx.Node) -> Pooling:
    out = ops.shape(anchor)
    if ops.Mean.matches(anchor):
        mean = ops.Mean.of(anchor)
        source = ops.shape(mean.input)
        if mean.dims != tuple(range(2, len(source))) or not mean.keepdim:
            raise UnsupportedRegionError(f"mean over dimensions {mean.dims}")
        sizes = (*_two(source[2:], 1), *_two(out[2:], 1))
        return Pooling(out[0], *sizes, out[1], False, adaptive=True, depth=_depth(source, out))
    if not layers.Pool.matches(anchor):
        raise UnsupportedRegionError(f"no stage for {anchor.target}")
    pool = layers.Pool.of(anchor)
    source = ops.shape(pool.input)
    if len(source) != len(out) or len(source) < 3:
        raise UnsupportedRegionError("a pooling without a batch dimension")
    base = Pooling(out[0], *_two(source[2:], 1), *_two(out[2:], 1), out[1], pool.kind == "max")
    if pool.kind == "adaptive_avg":
        return replace(base, adaptive=True, depth=_depth(source, out))
    return replace(
        base,
        kernel=_two(pool.kernel, 1),
        stride=_two(pool.stride, 1),
        padding=_two(pool.padding, 0),
        dilation=_two(pool.dilation, 1),
        include_padding=pool.count_include_pad,
        divisor=pool.divisor_override or 0,
        depth=_depth(source, out, pool.kernel, pool.stride, pool.padding, pool.dilation),
    )
