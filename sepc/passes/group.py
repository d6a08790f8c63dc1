"""group: partition the graph into regions, one kernel each.

Pattern. An *anchor* (convolution, linear layer, pooling, layer normalisation) or an elementwise operator, followed by a chain

    v₀ = anchor(x, …),   vᵢ₊₁ = fᵢ(vᵢ, operands…)

in which each vᵢ (i < n) has fᵢ as its only user, each fᵢ is elementwise on float32 and keeps the shape, and operands broadcast
to it. A permute inside the chain is allowed where an elementwise operator follows it: it only relabels dimensions.

Equation. Evaluating fₙ∘…∘f₁ on each vector of v₀ while it is in registers gives vₙ; v₀ … vₙ₋₁ are never stored.

Zero padding of the image in front of a convolution belongs to its region: stages skip taps that fall outside.

Preconditions. The chain is convex by construction: no vᵢ has another user, so nothing outside depends on it. Operands
are computed before the last fᵢ, where the region is put. What no stage of ours covers becomes a region of its own, with
the reason, and is run by TVM or PyTorch. Views stay outside: they cost nothing.

    %c = conv2d(%x, %w, %b)
    %r = relu(%c)                    →    %region = region_0_convolution(%x, %y)
    %a = add(%r, %y)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sepc.ir import ops
from sepc.ir.elementwise import broadcasts, is_elementwise
from sepc.ir.region import RegionInfo, extract
from sepc.ir.views import is_view
from sepc.passes.manager import PassContext

aten = torch.ops.aten


@dataclass(frozen=True)
class Group:
    """The first partition: each anchor with its elementwise epilogue."""

    name: ClassVar[str] = "group"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module` so that all computation is in regions; returns whether there was any."""
        count = 0
        taken: set[fx.Node] = set()
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function" or node in taken or not _computes(node):
                continue
            anchor = padded_convolution(node) or node
            info = classify(anchor)
            chain = [node] if anchor is node else [node, anchor]
            if info.kernel == "sepc" and info.kind != "concatenation":
                chain += epilogue(anchor)
            if info.reason:
                context.note(self.name, node, info.reason)
            taken.update(chain)
            extract(graph_module, chain, f"region_{count}_{info.kind}", info, self.name)
            count += 1
        return count > 0


def padded_convolution(node: fx.Node) -> fx.Node | None:
    """The convolution that can read around the zeros which `node` pads its input with, if `node` does just that."""
    user = _only_user(node)
    if not ops.Pad.matches(node) or user is None or not ops.Conv.matches(user) or ops.Conv.of(user).input is not node:
        return None
    pad = ops.Pad.of(node)
    spatial = pad.before[:2] == pad.after[:2] == (0, 0) and min(*pad.before, *pad.after) >= 0
    zeros = pad.mode == "constant" and pad.value == 0
    return user if spatial and zeros and classify(user).kernel == "sepc" else None


def _computes(node: fx.Node) -> bool:
    return not is_view(node) and node.target is not operator.getitem


def classify(node: fx.Node) -> RegionInfo:
    """The region that `node` would be the anchor of: its kind, and the reason where no stage of ours covers it."""
    if is_elementwise(node):
        return RegionInfo("elementwise")
    kind, reason = _anchor_kind(node)
    if reason:
        return RegionInfo("other", "torch", reason)
    tensors = [argument for argument in node.all_input_nodes if "val" in argument.meta]
    foreign = next((t for t in (node, *tensors) if ops.dtype(t) != torch.float32), None)
    if foreign is not None:
        return RegionInfo("other", "torch", f"{node.target} on {ops.dtype(foreign)}: our stages compute in float32")
    if any(0 in ops.shape(tensor) for tensor in (node, *tensors)):
        return RegionInfo("other", "torch", f"{node.target} on an empty tensor")
    return RegionInfo(kind)


def _anchor_kind(node: fx.Node) -> tuple[str, str]:
    """The kind of region that `node` anchors, and why it anchors none (empty if it does)."""
    target = str(node.target)
    if not isinstance(node.meta["val"], torch.Tensor):
        return "other", f"{target} has several results"
    rank = len(ops.shape(node))
    if ops.Conv.matches(node):
        conv = ops.Conv.of(node)
        if not (ops.is_constant(conv.weight) and (conv.bias is None or ops.is_constant(conv.bias))):
            return "other", f"{target} whose weight is computed"
        return "convolution", "" if rank in (3, 4) and rank == len(ops.shape(conv.input)) and len(conv.kernel) == rank - 2 else (
            f"{target} of a tensor with {rank} dimensions"
        )
    if ops.Linear.matches(node):
        linear = ops.Linear.of(node)
        if not (ops.is_constant(linear.weight) and (linear.bias is None or ops.is_constant(linear.bias))):
            return "other", f"{target} whose weight is computed"
        return "linear", "" if len(ops.shape(linear.weight)) == 2 and rank >= 2 else f"{target} without batch or rows"
    if ops.LayerNorm.matches(node):
        norm = ops.LayerNorm.of(node)
        constants = all(c is None or ops.is_constant(c) for c in (norm.weight, norm.bias))
        one = len(norm.normalized_shape) == 1
        return "normalization", "" if one and constants else f"{target} over several dimensions or with computed gains"
    if ops.Pool.matches(node):
        pool = ops.Pool.of(node)
        spatial = len(pool.kernel or pool.output_size)
        return "pooling", "" if rank == spatial + 2 else f"{target} without a batch dimension"
    if ops.Mean.matches(node):
        mean, rank_in = ops.Mean.of(node), len(ops.shape(ops.Mean.of(node).input))
        spatial_mean = rank_in in (3, 4) and mean.dims == tuple(range(2, rank_in)) and mean.keepdim
        return "pooling", "" if spatial_mean else f"{target} over dimensions {mean.dims}"
    if ops.Cat.matches(node):
        return "concatenation", ""
    return "other", f"no stage for {target}"


def epilogue(anchor: fx.Node) -> Iterator[fx.Node]:
    """The elementwise operators (and permutes between them) that the region of `anchor` can take along."""
    current, seen = anchor, {anchor}
    while (user := _only_user(current)) is not None:
        if fuses(user, current, seen):
            yield user
            seen.add(user)
            current = user
            continue
        following = _only_user(user) if ops.Permute.matches(user) else None
        if following is None or not fuses(following, user, seen):
            return
        yield user
        yield following
        seen |= {user, following}
        current = following


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def fuses(node: fx.Node, value: fx.Node, members: set[fx.Node]) -> bool:
    """Whether elementwise `node` can be applied to `value` in registers: same shape, other operands broadcast to it."""
    if not is_elementwise(node) or ops.shape(node) != ops.shape(value):
        return False
    others = [argument for argument in node.all_input_nodes if argument is not value and argument not in members]
    return all(broadcasts(ops.shape(other), ops.shape(node)) for other in others)
