"""Which ATen operators are elementwise, and what they cost. The backends have a rule for each of them.

The cost is in vector instructions per vector of results, roughly: 1 for an addition, 10 and more where a polynomial is
evaluated.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.ir import ops

aten = torch.ops.aten

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
}


def is_elementwise(node: fx.Node) -> bool:
    """Whether `node` is an elementwise operator on float32 tensors that the backends have a rule for."""
    if node.op != "call_function" or node.target not in OPERATIONS:
        return False
    tensors = [argument for argument in node.all_input_nodes if "val" in argument.meta]
    return all(ops.dtype(tensor) == torch.float32 for tensor in (node, *tensors))


def instructions(node: fx.Node) -> int:
    """Vector instructions per vector of results that `node` takes; 0 for an operator that is not elementwise."""
    return OPERATIONS.get(node.target, 0) if isinstance(node.target, OpOverload) else 0


def broadcasts(operand: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Whether a tensor of shape `operand` broadcasts to exactly `result`."""
    aligned = operand[::-1]
    return len(operand) <= len(result) and all(a in (1, r) for a, r in zip(aligned, result[::-1], strict=False))
