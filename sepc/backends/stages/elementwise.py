"""Elementwise ATen operators as vector expressions: the epilogue of every stage, and stages of their own.

Each rule takes the operator's arguments in schema order (tensors as vector expressions, everything else as Python
values) and returns a vector expression. The keys are exactly those of `sepc.ir.elementwise.OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages import math
from sepc.backends.stages.vector import Expr, Index, Operand, cast, constant, lanes_of, type_of
from sepc.ir import ops
from sepc.ir.elementwise import computes_in

aten = torch.ops.aten


def _scalar(value: float, like: Expr) -> Expr:
    return constant(float(value), lanes_of(like), type_of(like))


def _hardsigmoid(x: Expr) -> Expr:
    return math.clamp(x + _scalar(3, x), 0, 6) * _scalar(1 / 6, x)


def _hardswish(x: Expr) -> Expr:
    x = T.Bind(x)
    return x * (math.clamp(x + _scalar(3, x), 0, 6) * _scalar(1 / 6, x))  # Six times x might be too large.


def _leaky_relu(x: Expr, slope: float) -> Expr:
    x = T.Bind(x)
    return tirx.Select(tirx.GT(x, _scalar(0, x)), x, x * _scalar(slope, x))


def _scaled(x: Any, factor: float, like: Expr) -> Expr:
    """`factor · x`, for the ``alpha`` of additions; `x` may be a number."""
    x = _scalar(x, like) if isinstance(x, int | float) else x
    return x if factor == 1 else x * _scalar(factor, like)


def _times(left: Any, right: Any) -> Expr:
    like = right if isinstance(left, int | float) else left
    return _scaled(left, 1, like) * _scaled(right, 1, like)


def _over(left: Any, right: Any) -> Expr:
    like = right if isinstance(left, int | float) else left
    return _scaled(left, 1, like) / _scaled(right, 1, like)


def _square(x: Expr) -> Expr:
    x = T.Bind(x)
    return x * x


RULES: dict[OpOverload, Callable[..., Expr]] = {
    aten.add.Tensor: lambda a, b, alpha: a + _scaled(b, alpha, a),
    aten.add.Scalar: lambda a, b, alpha: a + _scaled(b, alpha, a),
    aten.sub.Tensor: lambda a, b, alpha: a - _scaled(b, alpha, a),
    aten.sub.Scalar: lambda a, b, alpha: a - _scaled(b, alpha, a),
    aten.rsub.Scalar: lambda a, b, alpha: _scalar(b, a) - _scaled(a, alpha, a),
    aten.mul.Tensor: _times,
    aten.mul.Scalar: _times,
    aten.div.Tensor: _over,
    aten.div.Scalar: _over,
    aten.maximum.default: math.maximum,
    aten.minimum.default: math.minimum,
    aten.neg.default: lambda x: x * _scalar(-1, x),
    aten.abs.default: tirx.abs,
    aten.square.default: _square,
    aten.sqrt.default: tirx.sqrt,
    aten.rsqrt.default: lambda x: _scalar(1, x) / tirx.sqrt(x),
    aten.reciprocal.default: lambda x: _scalar(1, x) / x,
    aten.exp.default: math.exp,
    aten.relu.default: lambda x: math.clamp(x, 0, None),
    aten.clamp.default: math.clamp,
    aten.clamp_min.default: lambda x, low: math.clamp(x, low, None),
    aten.clamp_max.default: lambda x, high: math.clamp(x, None, high),
    aten.hardtanh.default: math.clamp,
    aten.hardswish.default: _hardswish,
    aten.hardsigmoid.default: _hardsigmoid,
    aten.leaky_relu.default: _leaky_relu,
    aten.sigmoid.default: math.sigmoid,
    aten.silu.default: math.silu,
    aten.tanh.default: math.tanh,
    aten.erf.default: math.erf,
    aten.gelu.default: lambda x, approximate: math.gelu_tanh(x) if approximate == "tanh" else math.gelu(x),
    aten.clone.default: lambda x, memory_format: x,
    aten._to_copy.default: lambda x, dtype, *options: x,
}


def evaluate(node: fx.Node, given: Sequence[Any]) -> Expr:
    """The value of the elementwise `node`, whose arguments are `given`, in schema order.

    In the type of its result, or in float32 where `computes_in` says so; the result is then rounded.
    """
    assert isinstance(node.target, OpOverload)
    inside = computes_in(node).name
    converted = [cast(one, inside) if isinstance(one, tirx.Expr) else one for one in given]
    return cast(RULES[node.target](*converted), ops.element(node).name)


@dataclass(frozen=True)
class Expression:
    """A run of elementwise nodes, evaluated on vectors; without any it is what it is given, or its only operand.

    Attributes:
        nodes: elementwise and permute nodes, in execution order; a permute only relabels dimensions.
        operands: the tensors read from memory, strides over the kernel's iteration dimensions.
    """

    nodes: Sequence[fx.Node]
    operands: Mapping[fx.Node, Operand]

    def __call__(self, values: Mapping[fx.Node, Expr], position: Sequence[Index], lanes: int) -> Expr:
        """The value of the last node at `position`, given `values` of nodes computed by the kernel itself."""
        known: dict[fx.Node, Expr] = dict(values)

        def value(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            if argument not in known:
                known[argument] = T.Bind(self.operands[argument].load(position, lanes))
            return known[argument]

        if not self.nodes:
            return next(iter(values.values())) if values else value(next(iter(self.operands)))
        result: Expr = None
        for node in self.nodes:
            given = list(ops.arguments(node).values())
            if node.target is aten.permute.default:
                known[node] = value(given[0])
            else:
                known[node] = T.Bind(evaluate(node, [value(one) for one in given]))
            result = known[node]
        return result
