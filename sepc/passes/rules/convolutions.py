"""Convolutions: explicit numbers, a batch dimension, and zero padding as an option of theirs.

Pattern and equation.

    convolution(x, w, b, …)                   →    conv1d, conv2d, conv3d, or conv_transpose1d, …, by the rank of w
    conv(x, w, padding="same")                →    conv(pad(x, what is odd), w, padding=numbers)
    conv(x without batch)                     →    view(conv(view(x, [1, …]))),      transposed alike
    pad(x, amounts, "constant", value)        →    constant_pad_nd(x, amounts, value)
    conv(pad(x, p zeros on both sides), …)    →    conv(x, …, padding + p)

Preconditions. A pad joins the convolution only if it is of zeros, around pixels, and alike on both
sides; other pads are rejected with the reason (asymmetric ones join its region later; see `group`).
"""

from __future__ import annotations

import operator

from torch import fx

from sepc.ir.layers import Conv, ConvTranspose
from sepc.ir.ops import Pad, arguments, aten, is_op, per_dimension, shape
from sepc.passes.rewriter import Rejection, Rewriter, Rule
from sepc.passes.rules.respell import Call, Respell


class NumericConv(Rule[tuple[Conv, tuple[int, ...]]]):
    """Any convolution that is not transposed as conv1d/2d/3d, with numbers for its padding and a batch dimension."""

    by_name = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
    targets = (*Conv.targets, *by_name, aten.convolution.default)

    def match(self, node: fx.Node, module: fx.GraphModule) -> tuple[Conv, tuple[int, ...]] | None:
        """The convolution, and how many zeros more it needs after each spatial dimension than before it."""
        named = arguments(node)
        kernel = shape(named["weight"])[2:]
        rank = len(kernel)
        if named.get("transposed") or (Conv.matches(node) and len(shape(node)) == rank + 2):
            return None
        stride, dilation = (per_dimension(named[name], rank) for name in ("stride", "dilation"))
        around = [0] * rank
        if named["padding"] == "same":
            around = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        elif named["padding"] != "valid":
            around = [2 * size for size in per_dimension(named["padding"], rank)]
        padding, more = tuple(size // 2 for size in around), tuple(size % 2 for size in around)
        return Conv(named["input"], named["weight"], named["bias"], stride, padding, dilation, named["groups"]), more

    def rewrite(self, match: tuple[Conv, tuple[int, ...]], build: Rewriter) -> fx.Node:
        """The convolution, after a padding if its own is not symmetric, between views if it had no batch dimension."""
        conv, more = match
        source = conv.input
        batched = len(shape(source)) == len(conv.stride) + 2
        if not batched:
            source = build.call(aten.view.default, source, [1, *shape(source)])
        if any(more):
            amounts = [amount for size in reversed(more) for amount in (0, size)]
            source = build.call(aten.constant_pad_nd.default, source, amounts, 0)
        target, args = _conv_call(conv, source, conv.padding)
        result = build.call(target, *args)
        return result if batched else build.call(aten.view.default, result, list(shape(result)[1:]))


class NumericTransposed(Rule[ConvTranspose]):
    """Any transposed convolution as conv_transpose1d/2d/3d, with a batch dimension."""

    targets = (*ConvTranspose.targets, aten.convolution.default)

    def match(self, node: fx.Node, module: fx.GraphModule) -> ConvTranspose | None:
        """The convolution, if it is not of that form yet."""
        named = arguments(node)
        rank = len(shape(named["weight"])) - 2
        if not named.get("transposed", True) or (ConvTranspose.matches(node) and len(shape(node)) == rank + 2):
            return None
        return ConvTranspose.read(named)

    def rewrite(self, match: ConvTranspose, build: Rewriter) -> fx.Node:
        """The transposed convolution, between views if it had no batch dimension."""
        source, rank = match.input, len(match.stride)
        batched = len(shape(source)) == rank + 2
        if not batched:
            source = build.call(aten.view.default, source, [1, *shape(source)])
        spatial = (list(match.stride), list(match.padding), list(match.output_padding))
        options = (match.weight, match.bias, *spatial, match.groups, list(match.dilation))
        result = build.call(ConvTranspose.targets[rank - 1], source, *options)
        return result if batched else build.call(aten.view.default, result, list(shape(result)[1:]))


def _conv_call(conv: Conv, source: fx.Node, padding: tuple[int, ...]) -> Call:
    options = (list(conv.stride), list(padding), list(conv.dilation), conv.groups)
    return Conv.targets[len(conv.stride) - 1], (source, conv.weight, conv.bias, *options)


def _as_constant_pad(node: fx.Node, module: fx.GraphModule) -> Call | None:
    pad = Pad.of(node)
    if pad.mode != "constant":
        return None
    return aten.constant_pad_nd.default, (pad.input, arguments(node)["pad"], pad.value)


def _as_padded_conv(node: fx.Node, module: fx.GraphModule) -> Call | Rejection | None:
    conv = Conv.of(node)
    if not is_op(conv.input, aten.constant_pad_nd.default):
        return None
    pad, name = Pad.of(conv.input), conv.input.name
    if pad.value != 0:
        return Rejection(f"{name} pads with {pad.value}, a convolution with zeros")
    if any((*pad.before[:2], *pad.after[:2])):
        return Rejection(f"{name} pads batch or channels")
    if min((*pad.before, *pad.after)) < 0:
        return Rejection(f"{name} crops")
    if pad.before != pad.after:
        return Rejection(f"{name} pads {pad.before[2:]} before and {pad.after[2:]} after")
    return _conv_call(conv, pad.input, tuple(map(operator.add, conv.padding, pad.before[2:])))


AS_CONSTANT_PAD = Respell((aten.pad.default,), _as_constant_pad)
AS_PADDED_CONV = Respell(Conv.targets, _as_padded_conv)
