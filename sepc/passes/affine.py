"""Chains of affine steps along one channel dimension, as one scale and one shift; what fold-batch-norm works on.

Pattern. ``batch_norm`` with constant statistics; add, sub, mul, div by a number or by a constant that varies along one
dimension only; and chains of these, each with one user, along one dimension.

Equation. In float64,

    batch_norm(x) = s·x + t    with  s = γ / √(σ² + ε),  t = β - μ·s        (per channel)
    s₂·(s₁·x + t₁) + t₂ = (s₂s₁)·x + (s₂t₁ + t₂)

Preconditions. Statistics and parameters are constants; the step keeps shape and float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sepc.ir.layers import BatchNorm
from sepc.ir.ops import Binary, aten, constant, dtype, is_constant, shape
from sepc.passes.rewriter import Rejection, Rewriter


@dataclass(frozen=True)
class Affine:
    """``scale * input + shift`` in float64: vectors along dimension `dim`, or numbers where `dim` is None."""

    input: fx.Node
    dim: int | None
    scale: torch.Tensor
    shift: torch.Tensor
    nodes: tuple[fx.Node, ...]

    @property
    def is_scaled(self) -> bool:
        """Whether the scale is not 1 everywhere."""
        return bool((self.scale != 1).any())

    @property
    def is_shifted(self) -> bool:
        """Whether the shift is not 0 everywhere."""
        return bool((self.shift != 0).any())

    def after(self, first: Affine) -> Affine:
        """This step applied to the result of `first`."""
        dim = self.dim if self.dim is not None else first.dim
        shift = self.scale * first.shift + self.shift
        return Affine(first.input, dim, self.scale * first.scale, shift, (*first.nodes, *self.nodes))


def read_step(node: fx.Node, module: fx.GraphModule) -> Affine | Rejection | None:
    """`node` as one affine step; None if it is none, a rejection if it is a batch norm with computed statistics."""
    return _read_norm(node, module) if BatchNorm.matches(node) else _read_binary(node, module)


def _read_norm(node: fx.Node, module: fx.GraphModule) -> Affine | Rejection:
    norm = BatchNorm.of(node)
    parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if not all(one is None or is_constant(one) for one in parameters):
        return Rejection("its statistics or parameters are computed at run time")
    if dtype(node) != torch.float32:
        return Rejection(f"it computes in {dtype(node)}")
    mean, variance = (constant(module, one).double() for one in (norm.running_mean, norm.running_var))
    weight, bias = (0.0 if one is None else constant(module, one).double() for one in (norm.weight, norm.bias))
    scale = torch.rsqrt(variance + norm.eps) * (1.0 if norm.weight is None else weight)
    return Affine(norm.input, 1, scale, bias - mean * scale, (node,))


def _read_binary(node: fx.Node, module: fx.GraphModule) -> Affine | None:
    if not Binary.matches(node) or dtype(node) != torch.float32 or is_constant(Binary.of(node).input):
        return None
    binary = Binary.of(node)
    if shape(binary.input) != shape(node) or dtype(binary.input) != torch.float32:
        return None
    found = _operand(binary.other, module, len(shape(node)))
    if found is None:
        return None
    dim, value = found
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if binary.kind in ("mul", "div"):
        return Affine(binary.input, dim, value if binary.kind == "mul" else one / value, zero, (node,))
    sign = binary.alpha if binary.kind == "add" else -binary.alpha
    return Affine(binary.input, dim, one, sign * value, (node,))


def _operand(other: fx.Node | int | float, module: fx.GraphModule, rank: int) -> tuple[int | None, torch.Tensor] | None:
    """A constant operand as (dimension of the result along which it varies, its values); None for any other operand."""
    if isinstance(other, int | float):
        return None, torch.tensor(float(other), dtype=torch.float64)
    sizes = shape(other)
    varying = [dim for dim, size in enumerate(sizes) if size > 1]
    if not is_constant(other) or len(varying) > 1:
        return None
    value = constant(module, other).double()
    return (varying[0] + rank - len(sizes), value.flatten()) if varying else (None, value.reshape(()))


def _compatible(first: Affine, second: Affine) -> bool:
    return first.dim is None or second.dim is None or first.dim == second.dim


def continues(node: fx.Node, step: Affine, module: fx.GraphModule) -> bool:
    """Whether the only user of `node` is a step that the chain goes on with."""
    if len(node.users) != 1:
        return False
    following = read_step(next(iter(node.users)), module)
    return isinstance(following, Affine) and following.input is node and _compatible(step, following)


def read_chain(last: Affine, module: fx.GraphModule) -> Affine:
    """The longest chain that ends with step `last`."""
    chain = last
    while len(chain.input.users) == 1:
        step = read_step(chain.input, module)
        if not isinstance(step, Affine) or not _compatible(step, chain):
            break
        chain = chain.after(step)
    return chain


def build_affine(chain: Affine, build: Rewriter) -> fx.Node:
    """`chain` as a mul and an add, each only if needed; constants of shape [C, 1, …] align with `chain.dim`."""
    result = chain.input
    steps = ((aten.mul.Tensor, chain.scale, chain.is_scaled), (aten.add.Tensor, chain.shift, chain.is_shifted))
    for target, value, needed in steps:
        if needed and chain.dim is None:
            result = build.call(target, result, float(value))
        elif needed:
            trailing = len(shape(chain.input)) - 1 - (chain.dim or 0)
            hint = f"{build.anchor.name}_{'scale' if target is aten.mul.Tensor else 'shift'}"
            result = build.call(target, result, build.constant(hint, value.float().reshape(-1, *[1] * trailing)))
    return result
