"""group: partition the graph into regions, one kernel each.

Pattern. An *anchor* (convolution, transposed or not, linear layer, pooling, normalisation) or an elementwise
operator, followed by a chain

    v₀ = anchor(x, …),   vᵢ₊₁ = fᵢ(vᵢ, operands…)

in which each vᵢ (i < n) has fᵢ as its only user, each fᵢ is elementwise on float32 (or float16, after `demote`) and
keeps the shape, and operands broadcast to it. A permute in the chain is allowed where an elementwise operator
follows: it only relabels dimensions.
No operand is read both before and after a permute, since a kernel walks through each in one order.

Equation. Evaluating fₙ∘…∘f₁ on each vector of v₀ while it is in registers gives vₙ; v₀ … vₙ₋₁ are never stored.

Zero padding of the image in front of a convolution belongs to its region: stages skip taps that fall outside.

Preconditions. The chain is convex by construction: no vᵢ has another user, so nothing outside depends on it. Operands
are computed before the last fᵢ, where the region is put. What no stage of ours covers (`ANCHORS`, and the obstacle each
may meet) becomes a region of its own, with the reason, and is run by TVM or PyTorch. Views stay outside: they cost
nothing.

    %c = conv2d(%x, %w, %b)
    %r = relu(%c)                    →    %region = region_0_convolution(%x, %y)
    %a = add(%r, %y)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sepc.ir import layers, ops
from sepc.ir.anchors import IMAGE_RANKS
from sepc.ir.elementwise import STAGE_TYPES, broadcasts, is_elementwise
from sepc.ir.phases import MOST_PHASES
from sepc.ir.region import RegionInfo, extract
from sepc.ir.views import is_view
from sepc.passes.manager import PassContext

Types = Collection[torch.dtype]


@dataclass(frozen=True)
class Group:
    """The first partition: each anchor with its elementwise epilogue."""

    name: ClassVar[str] = "group"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module` so that all computation is in regions; returns whether there was any."""
        count = 0
        taken: set[fx.Node] = set()
        for node in list(graph_module.graph.nodes):
            if node in taken or not _computes(node):
                continue
            anchor = padded_convolution(node, context.types) or node
            info = classify(anchor, context.types)
            chain = [node] if anchor is node else [node, anchor]
            if info.kernel == "sepc" and info.kind != "concatenation":
                chain += epilogue(anchor, context.types)
            if info.reason:
                context.note(self.name, node, info.reason)
            taken.update(chain)
            extract(graph_module, chain, f"region_{count}_{info.kind}", info, self.name)
            count += 1
        return count > 0


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_view(node) and node.target is not operator.getitem


# ---- what a region hangs on


def classify(node: fx.Node, types: Types = STAGE_TYPES) -> RegionInfo:
    """The region that `node` would be the anchor of: its kind, and the reason where no stage of ours covers it.

    `types` are those that stages compute with.
    """
    if not isinstance(node.meta["val"], torch.Tensor):
        return _foreign(f"{node.target} has several results")
    if is_elementwise(node, types):
        reason = _type_obstacle(node, types)
        return _foreign(f"{node.target} {reason}") if reason else RegionInfo("elementwise")
    anchor = next((anchor for anchor in ANCHORS if anchor.operators.matches(node)), None)
    if anchor is None:
        return _foreign(f"no stage for {node.target}")
    reason = anchor.obstacle(node) or _input_obstacle(node) or _type_obstacle(node, types)
    return _foreign(f"{node.target} {reason}") if reason else RegionInfo(anchor.kind)


def _foreign(reason: str) -> RegionInfo:
    return RegionInfo("other", "torch", reason)


@dataclass(frozen=True)
class Anchor:
    """One kind of operator that a region may hang on.

    Attributes:
        kind: the region's kind. operators: the accessor of the operators.
        obstacle: why no stage covers such a node; empty where one does.
    """

    kind: str
    operators: type[ops.Accessor]
    obstacle: Callable[[fx.Node], str]


def _convolution_obstacle(node: fx.Node) -> str:
    conv, rank = layers.Conv.of(node), len(ops.shape(node))
    if not _are_constant(conv.weight, conv.bias):
        return "whose weight is computed"
    if rank != len(conv.kernel) + 2:
        return "without a batch dimension"
    return "" if rank in IMAGE_RANKS else f"of a tensor with {rank} dimensions"


def _transposed_obstacle(node: fx.Node) -> str:
    conv = layers.ConvTranspose.of(node)
    if not _are_constant(conv.weight, conv.bias):
        return "whose weight is computed"
    phases = math.prod(conv.stride)
    return "" if phases <= MOST_PHASES else f"of {phases} phases, more than {MOST_PHASES}"


def _linear_obstacle(node: fx.Node) -> str:
    linear = layers.Linear.of(node)
    if not _are_constant(linear.weight, linear.bias):
        return "whose weight is computed"
    return "" if len(ops.shape(linear.weight)) == 2 and len(ops.shape(node)) >= 2 else "without a batch dimension"


def _normalization_obstacle(node: fx.Node) -> str:
    norm = layers.LayerNorm.of(node)
    if not _are_constant(norm.weight, norm.bias):
        return "whose weight is computed"
    return "" if len(norm.normalized_shape) == 1 else "over more than the last dimension"


def _rms_obstacle(node: fx.Node) -> str:
    norm = layers.RMSNorm.of(node)
    if not _are_constant(norm.weight):
        return "whose weight is computed"
    return "" if len(norm.normalized_shape) == 1 else "over more than the last dimension"


def _groups_obstacle(node: fx.Node) -> str:
    norm, rank = layers.GroupNorm.of(node), len(ops.shape(node))
    if not _are_constant(norm.weight, norm.bias):
        return "whose weight is computed"
    if norm.has_statistics:
        return "with running statistics"
    return "" if rank in IMAGE_RANKS else f"of a tensor with {rank} dimensions"


def _softmax_obstacle(node: fx.Node) -> str:
    softmax, rank = layers.Softmax.of(node), len(ops.shape(node))
    return "" if rank >= 2 and softmax.dim == rank - 1 else f"over dimension {softmax.dim} of {rank}"


def _product_obstacle(node: fx.Node) -> str:
    product = layers.Product.of(node)
    return "" if min(len(ops.shape(factor)) for factor in (product.left, product.right)) >= 2 else "with a vector"


def _pooling_obstacle(node: fx.Node) -> str:
    pool = layers.Pool.of(node)
    spatial = len(pool.kernel or pool.output_size)
    return "" if len(ops.shape(node)) == spatial + 2 else "without a batch dimension"


def _mean_obstacle(node: fx.Node) -> str:
    mean = ops.Mean.of(node)
    rank = len(ops.shape(mean.input))
    over_pixels = rank in IMAGE_RANKS and mean.dims == tuple(range(2, rank)) and mean.keepdim
    return "" if over_pixels else f"over dimensions {mean.dims} of {rank}"


def _no_obstacle(node: fx.Node) -> str:
    return ""


def _input_obstacle(node: fx.Node) -> str:
    """Why the tensor that `node` works on is none that our stages read; empty where it is."""
    reads_constants = ops.Cat.matches(node) or layers.Product.matches(node)
    return "of a constant" if not reads_constants and ops.is_constant(node.all_input_nodes[0]) else ""


def _type_obstacle(node: fx.Node, types: Types) -> str:
    """Why the types of `node` and its inputs are none that our stages compute with; empty where they are."""
    tensors = [node, *(argument for argument in node.all_input_nodes if "val" in argument.meta)]
    foreign = next((tensor for tensor in tensors if ops.dtype(tensor) not in types), None)
    if foreign is not None:
        names = " and ".join(str(one).removeprefix("torch.") for one in types)
        return f"on {ops.dtype(foreign)}: our stages compute in {names}"
    return "on an empty tensor" if any(0 in ops.shape(tensor) for tensor in tensors) else ""


def _are_constant(*parameters: fx.Node | None) -> bool:
    return all(parameter is None or ops.is_constant(parameter) for parameter in parameters)


ANCHORS: tuple[Anchor, ...] = (
    Anchor("convolution", layers.Conv, _convolution_obstacle),
    Anchor("convolution", layers.ConvTranspose, _transposed_obstacle),
    Anchor("linear", layers.Linear, _linear_obstacle),
    Anchor("normalization", layers.LayerNorm, _normalization_obstacle),
    Anchor("normalization", layers.RMSNorm, _rms_obstacle),
    Anchor("normalization", layers.GroupNorm, _groups_obstacle),
    Anchor("normalization", layers.Softmax, _softmax_obstacle),
    Anchor("product", layers.Product, _product_obstacle),
    Anchor("pooling", layers.Pool, _pooling_obstacle),
    Anchor("pooling", ops.Mean, _mean_obstacle),
    Anchor("concatenation", ops.Cat, _no_obstacle),
)


# ---- what goes with it


def padded_convolution(node: fx.Node, types: Types = STAGE_TYPES) -> fx.Node | None:
    """The convolution that can read around the zeros which `node` pads its input with, if `node` does just that."""
    user = _only_user(node)
    if (
        user is None
        or not ops.Pad.matches(node)
        or not layers.Conv.matches(user)
        or layers.Conv.of(user).input is not node
    ):
        return None
    return user if _pads_pixels_with_zeros(ops.Pad.of(node)) and classify(user, types).kernel == "sepc" else None


def _pads_pixels_with_zeros(pad: ops.Pad) -> bool:
    zeros = pad.mode == "constant" and pad.value == 0
    return zeros and pad.before[:2] == pad.after[:2] == (0, 0) and min(*pad.before, *pad.after) >= 0


def epilogue(anchor: fx.Node, types: Types = STAGE_TYPES) -> list[fx.Node]:
    """The elementwise operators (and permutes between them) that the region of `anchor` can take along."""
    chain = [anchor]
    # A kernel reads each operand in one order. So what was read before a permute cannot be read after it.
    read, barred = set(anchor.all_input_nodes if is_elementwise(anchor, types) else ()), set[fx.Node]()
    while (user := _only_user(chain[-1])) is not None:
        following = _only_user(user) if ops.Permute.matches(user) else None
        if fuses(user, chain, barred, types):
            chain.append(user)
        elif following is not None and fuses(following, [*chain, user], read, types):
            barred = set(read)
            chain += [user, following]
        else:
            break
        read.update(chain[-1].all_input_nodes)
    return chain[1:]


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def fuses(node: fx.Node, chain: Sequence[fx.Node], barred: Collection[fx.Node], types: Types = STAGE_TYPES) -> bool:
    """Whether elementwise `node` can follow `chain` in registers.

    It must keep the shape of the chain's last value, and its other operands broadcast to that and are none of `barred`.
    """
    if not is_elementwise(node, types) or ops.shape(node) != ops.shape(chain[-1]):
        return False
    others = [argument for argument in node.all_input_nodes if argument not in chain]
    return all(broadcasts(ops.shape(other), ops.shape(node)) and other not in barred for other in others)
