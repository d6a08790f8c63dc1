"""Which ATen operators are elementwise, and what they cost. The backends have a rule for each of them.

The cost is in vector instructions per vector of results, roughly: 1 for an addition, 10 and more where a polynomial is
evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.ir import ops
from sepc.ir.element import FLOAT32, Element

aten = torch.ops.aten
STAGE_TYPES: Final = (torch.float32,)
HALF_RANGE: Final = (2.0**-14, 65504.0)
"""The least and the largest number that float16 holds with all its digits."""

OPERATIONS: dict[OpOverload, int] = {
    aten.add.Tensor: 1,
    aten.add.Scalar: 1,
    aten.sub.Tensor: 1,
    aten.sub.Scalar: 1,
    aten.rsub.Scalar: 1,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 8,
    aten.div.Scalar: 8,
    aten.maximum.default: 2,
    aten.minimum.default: 2,
    aten.neg.default: 1,
    aten.abs.default: 1,
    aten.square.default: 1,
    aten.sqrt.default: 12,
    aten.rsqrt.default: 16,
    aten.reciprocal.default: 8,
    aten.exp.default: 10,
    aten.relu.default: 1,
    aten.clamp.default: 2,
    aten.clamp_min.default: 1,
    aten.clamp_max.default: 1,
    aten.hardtanh.default: 2,
    aten.hardswish.default: 5,
    aten.hardsigmoid.default: 4,
    aten.leaky_relu.default: 3,
    aten.sigmoid.default: 13,
    aten.silu.default: 13,
    aten.tanh.default: 22,
    aten.erf.default: 22,
    aten.gelu.default: 18,
    aten.clone.default: 0,
    aten._to_copy.default: 1,
}

IN_ANY_TYPE: frozenset[OpOverload] = frozenset(
    {
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar),
        *(aten.mul.Tensor, aten.mul.Scalar, aten.maximum.default, aten.minimum.default, aten.neg.default),
        *(aten.abs.default, aten.square.default, aten.relu.default, aten.leaky_relu.default),
        *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default),
        *(aten.hardswish.default, aten.hardsigmoid.default, aten.clone.default, aten._to_copy.default),
    }
)
"""Operators of one rounding or few, which are computed in the type of their result; all others are in float32."""
CONVERSIONS: Final = 2
"""Vector instructions that converting a vector to float32, or back, takes."""


def is_elementwise(node: fx.Node, types: Collection[torch.dtype] = STAGE_TYPES) -> bool:
    """Whether `node` is an elementwise operator on tensors of `types` that the backends have a rule for."""
    if node.op != "call_function" or node.target not in OPERATIONS:
        return False
    if node.target is aten._to_copy.default and not _only_converts(node):
        return False
    tensors = [argument for argument in node.all_input_nodes if "val" in argument.meta]
    return all(ops.dtype(tensor) in types for tensor in (node, *tensors))


def _only_converts(node: fx.Node) -> bool:
    """Whether a conversion changes the type, and no more than that."""
    named = ops.arguments(node)
    converts = ops.dtype(named["self"]) != ops.dtype(node)
    return converts and all(named[name] is None for name in ("layout", "device", "pin_memory", "memory_format"))


def computes_in(node: fx.Node) -> Element:
    """The type in which elementwise `node` is computed: of its result, or float32 where digits would be lost."""
    own = ops.element(node)
    numbers = [abs(one) for one in ops.arguments(node).values() if isinstance(one, int | float)]
    fit = own == FLOAT32 or all(one in (0, math.inf) or HALF_RANGE[0] <= one <= HALF_RANGE[1] for one in numbers)
    return own if node.target in IN_ANY_TYPE and fit else FLOAT32


def instructions(node: fx.Node) -> int:
    """Vector instructions per vector of results that `node` takes; 0 for an operator that is not elementwise."""
    if not isinstance(node.target, OpOverload) or node.target not in OPERATIONS:
        return 0
    own, count = ops.element(node), OPERATIONS[node.target]
    if node.target is aten._to_copy.default or computes_in(node) == own:
        return count
    vectors = own.per_float32
    return vectors * (count + CONVERSIONS)


def broadcasts(operand: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Whether a tensor of shape `operand` broadcasts to exactly `result`."""
    aligned = operand[::-1]
    return len(operand) <= len(result) and all(a in (1, r) for a, r in zip(aligned, result[::-1], strict=False))
