"""Elementwise operators: clamps under one name, the number or constant of a binary operator second.

Pattern and equation.

    relu6(x)                                   →    clamp(x, 0, 6);      hardtanh, clamp_min, clamp_max alike
    clamp(x, 0, None)                          →    relu(x)
    add.Scalar(x, n, alpha)                    →    add.Tensor(x, n · alpha);      sub, mul, div alike
    add(constant, x), mul(constant, x)         →    add(x, constant), mul(x, constant)
    add(x, constant of one element)            →    add(x, number)
    addcmul(x, y, z, value=n)                  →    add(mul(y, z) · n, x)
    pow(x, 2)                                  →    square(x);      0.5, -0.5, -1 to sqrt, rsqrt, reciprocal
    glu(x, dim)                                →    a · sigmoid(b),      a and b being the halves of x along dim

Preconditions. The operator commutes (add without alpha, mul) where operands are exchanged; the type stays, and powers
are of floating-point tensors.
"""

from __future__ import annotations

import math

from torch import fx
from torch._ops import OpOverload

from sepc.ir.ops import Binary, arguments, aten, constant, dtype, is_constant, is_op, shape
from sepc.passes.rewriter import Rewriter, Rule
from sepc.passes.rules.respell import Call, Respell

_SCALAR_BINARY = (aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar)
_CLAMPS = (
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.clamp.default,
)
_POWERS: dict[float, OpOverload] = {
    2: aten.square.default,
    0.5: aten.sqrt.default,
    -0.5: aten.rsqrt.default,
    -1: aten.reciprocal.default,
}


def _as_clamp(node: fx.Node, module: fx.GraphModule) -> Call | None:
    named = arguments(node)
    low, high = named.get("min", named.get("min_val")), named.get("max", named.get("max_val"))
    if is_op(node, aten.relu6.default):
        low, high = 0, 6
    if low == 0 and high is None:
        return aten.relu.default, (named["self"],)
    return None if is_op(node, aten.clamp.default) else (aten.clamp.default, (named["self"], low, high))


def _as_binary(node: fx.Node, module: fx.GraphModule) -> Call | None:
    if not Binary.matches(node):
        kinds: dict[object, OpOverload] = dict(zip(_SCALAR_BINARY, Binary.targets, strict=True))
        named = arguments(node)
        return kinds[node.target], (named["self"], named["other"] * named.get("alpha", 1))
    binary = Binary.of(node)
    first, second, target = binary.input, binary.other, Binary.targets[Binary.position(node)]
    if not isinstance(second, fx.Node):
        return None
    if is_constant(second) and math.prod(shape(second)) == 1:
        return target, (first, constant(module, second).item() * binary.alpha)
    commutes = binary.kind == "mul" or (binary.kind == "add" and binary.alpha == 1)
    return (target, (second, first)) if commutes and is_constant(first) and not is_constant(second) else None


class AsProductAndSum(Rule[fx.Node]):
    """A product added to a tensor as the two operators that it is; scales and shifts of layers are spelt so."""

    targets = (aten.addcmul.default,)

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node:
        """Every such node."""
        return node

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        """The sum."""
        named = arguments(match)
        product = build.call(aten.mul.Tensor, named["tensor1"], named["tensor2"])
        return build.call(aten.add.Tensor, build.call(aten.mul.Tensor, product, named["value"]), named["self"])


def _as_root_or_square(node: fx.Node, module: fx.GraphModule) -> Call | None:
    named = arguments(node)
    target = _POWERS.get(named["exponent"])
    return (target, (named["self"],)) if target is not None and dtype(node).is_floating_point else None


class GatedHalves(Rule[tuple[fx.Node, int]]):
    """A gated linear unit as the product that it is: the halves are views, and the product an epilogue."""

    targets = (aten.glu.default,)

    def match(self, node: fx.Node, module: fx.GraphModule) -> tuple[fx.Node, int]:
        named = arguments(node)
        return named["self"], named["dim"] % len(shape(node))

    def rewrite(self, match: tuple[fx.Node, int], build: Rewriter) -> fx.Node:
        source, dim = match
        middle = shape(source)[dim] // 2
        value, gate = (build.call(aten.slice.Tensor, source, dim, start, start + middle) for start in (0, middle))
        return build.call(aten.mul.Tensor, value, build.call(aten.sigmoid.default, gate))


AS_CLAMP = Respell(_CLAMPS, _as_clamp)
AS_BINARY = Respell((*Binary.targets, *_SCALAR_BINARY), _as_binary)
AS_ROOT_OR_SQUARE = Respell((aten.pow.Tensor_Scalar,), _as_root_or_square)
