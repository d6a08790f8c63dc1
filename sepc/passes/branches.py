"""Sums of branches that are linear in one input, each as one convolution; what merge-branches works on.

Pattern. A tree of add and sub, with alpha, whose inner values have no other user, is a list of terms f·y. A term is a
chain of affine steps (`sepc.passes.affine`) behind a convolution of x, or behind x itself.

Equation. In float64, with f in s and t,

    s·(W∗x + b) + t = (s·W)∗x + (s·b + t)
    s·x + t         = (s∗x) + t                with s as a depthwise kernel of 1x1

Preconditions. Weights are constants, the convolution has no other user, s and t are finite and vary along channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sepc.ir.layers import Conv
from sepc.ir.ops import Binary, constant, dtype, is_constant, shape
from sepc.passes.affine import Affine, read_chain
from sepc.passes.rewriter import Rejection


@dataclass(frozen=True)
class Term:
    """A term of a sum: ``factor * node``, which is `chain` of a convolution, of an input, or of anything else."""

    node: fx.Node
    factor: int | float
    chain: Affine

    @property
    def layer(self) -> Conv | None:
        """The convolution that the chain follows, if there is one."""
        return Conv.of(self.chain.input) if Conv.matches(self.chain.input) else None


@dataclass(frozen=True)
class Branch:
    """A term as a convolution with nothing behind it, weights in float64; `layer` is None for the input itself."""

    term: Term
    layer: Conv | None
    weight: torch.Tensor
    bias: torch.Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's spatial size."""
        return tuple(self.weight.shape[2:])


def is_sum(node: fx.Node) -> bool:
    """Whether `node` adds or subtracts two different values of its own shape that are computed at run time."""
    if not Binary.matches(node) or dtype(node) != torch.float32:
        return False
    binary = Binary.of(node)
    operands = {one for one in (binary.input, binary.other) if isinstance(one, fx.Node) and not is_constant(one)}
    alike = all(shape(one) == shape(node) and dtype(one) == torch.float32 for one in operands)
    return binary.kind in ("add", "sub") and len(operands) == 2 and alike


def is_inner(node: fx.Node) -> bool:
    """Whether `node` is a sum that is a term of another one, and nothing else."""
    return is_sum(node) and len(node.users) == 1 and is_sum(next(iter(node.users)))


def read_terms(root: fx.Node, module: fx.GraphModule) -> list[Term]:
    """The terms of the sum that ends at `root`, from left to right."""
    terms: list[Term] = []
    pending: list[tuple[fx.Node, int | float]] = [(root, 1)]
    while pending:
        node, factor = pending.pop()
        if node is root or is_inner(node):
            binary = Binary.of(node)
            assert isinstance(binary.other, fx.Node), "is_sum saw to that"
            alpha = binary.alpha if binary.kind == "add" else -binary.alpha
            pending += [(binary.other, factor * alpha), (binary.input, factor)]
        else:
            scale, shift = torch.tensor([factor, 0.0], dtype=torch.float64)
            terms.append(Term(node, factor, read_chain(Affine(node, None, scale, shift, ()), module)))
    return terms


def terms_by_input(terms: list[Term]) -> dict[fx.Node, list[Term]]:
    """The terms that are linear in the same input, for every input of a convolution among them.

    A convolution that another one reads is an input, and as a term it is that input itself.
    """
    found = dict[fx.Node, list[Term]]((term.layer.input, []) for term in terms if term.layer is not None)
    for term in terms:
        if term.chain.input in found:
            found[term.chain.input].append(term)
        elif term.layer is not None:
            found[term.layer.input].append(term)
    return found


def read_branch(term: Term, source: fx.Node, module: fx.GraphModule) -> Branch | Rejection:
    """`term`, which is linear in `source`, as a convolution of it, or why it is none."""
    chain, layer = term.chain, None if term.chain.input is source else term.layer
    reason = _obstacle(chain, layer)
    if reason:
        return Rejection(reason)
    rank = len(shape(source)) - 2
    channels = shape(source)[1] if layer is None else layer.out_channels
    scale, shift = (one.expand(channels) for one in (chain.scale, chain.shift))
    column = scale.reshape(-1, *[1] * (rank + 1))
    if layer is None:
        return Branch(term, None, column, shift, (1,) * rank, (0,) * rank, (1,) * rank, channels)
    weight = constant(module, layer.weight).double() * column
    if layer.bias is not None:
        shift = constant(module, layer.bias).double() * scale + shift
    return Branch(term, layer, weight, shift, layer.stride, layer.padding, layer.dilation, layer.groups)


def _obstacle(chain: Affine, layer: Conv | None) -> str:
    """Why `chain`, behind `layer` or behind the input itself, is no branch; empty if it is one."""
    if chain.dim not in (None, 1):
        return f"it varies along dimension {chain.dim}, and channels are dimension 1"
    if not (chain.scale.isfinite().all() and chain.shift.isfinite().all()):
        return "its scale or shift is not finite"
    if layer is not None and len(chain.input.users) > 1:
        return f"{chain.input.name} has {len(chain.input.users)} users"
    if layer is not None and not (is_constant(layer.weight) and (layer.bias is None or is_constant(layer.bias))):
        return f"the weights of {chain.input.name} are computed at run time"
    return ""
