"""canonicalize: bring the graph into one spelling: same meaning, fewer kinds of nodes.

Every rule is an identity of tensors, and keeps shape, dtype and strides; a replacement that would not is rejected. Each
file in `sepc.passes.rules` states its own.

    f(constants)                                 → a constant, unless it is far larger than those    fold_constants
    dropout in eval, copies, identity views, ×1  → x                                                 no_ops
    reshape, flatten, squeeze, transpose, t      → view, permute; chains of them → one               views
    relu6, hardtanh, clamp_min, clamp_max        → clamp(x, low, high); clamp(x, 0) → relu           elementwise
    add, sub, mul, div of a number or constant   → .Tensor overload, the number or constant second   elementwise
    pow(x, 2), pow(x, 0.5), …                    → square(x), sqrt(x), …                             elementwise
    glu(x, dim)                                  → half · sigmoid(other half)                        elementwise
    addcmul(x, y, z)                             → add(mul(y, z), x)                                 elementwise
    split, chunk, BN, layer norm + getitem       → an operator of one result                         results
    layer norm of images, RMS norm in parts, …   → group_norm, rms_norm                              normalizations
    average over all pixels                      → mean(x, [2, 3], keepdim=True)                     pooling
    new_zeros, ones_like, … of any tensor        → full(size, value)                                 creation
    scaled_dot_product_attention                 → products and a softmax                            attention
    convolution, "same", zero padding before it  → conv1d/2d/3d with numbers                         convolutions

Preconditions: all shapes are static. Rejections are noted: an output that must stay a tensor of its own, padding that
is not symmetric, a view that the strides do not allow, a constant too large to fold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from sepc.passes.fold_constants import ConstantFolder
from sepc.passes.manager import PassContext
from sepc.passes.rewriter import Rule
from sepc.passes.rules.attention import AttentionInParts
from sepc.passes.rules.convolutions import AS_CONSTANT_PAD, AS_PADDED_CONV, NumericConv, NumericTransposed
from sepc.passes.rules.creation import AsFull
from sepc.passes.rules.elementwise import AS_BINARY, AS_CLAMP, AS_ROOT_OR_SQUARE, AsProductAndSum, GatedHalves
from sepc.passes.rules.no_ops import DropNoOp
from sepc.passes.rules.normalizations import (
    FlatRMSNorm,
    InstanceByStatistics,
    LayerNormOfImages,
    RMSNormInParts,
    SoftmaxAlongLast,
)
from sepc.passes.rules.pooling import GlobalMean
from sepc.passes.rules.results import AS_ONE_RESULT, AS_SELECTION, AS_SLICE
from sepc.passes.rules.views import AS_PERMUTE, AS_VIEW

RULES: tuple[Rule[Any], ...] = (
    DropNoOp(),
    AS_VIEW,
    AS_PERMUTE,
    AS_CLAMP,
    AS_BINARY,
    AS_ROOT_OR_SQUARE,
    GatedHalves(),
    AsProductAndSum(),
    AS_CONSTANT_PAD,
    AS_SLICE,
    AS_SELECTION,
    AS_ONE_RESULT,
    GlobalMean(),
    InstanceByStatistics(),
    LayerNormOfImages(),
    FlatRMSNorm(),
    RMSNormInParts(),
    SoftmaxAlongLast(),
    AttentionInParts(),
    AsFull(),
    NumericConv(),
    NumericTransposed(),
    AS_PADDED_CONV,
)


@dataclass(frozen=True)
class Canonicalize:
    """The pass: constants are folded and rules applied until nothing changes.

    Attributes:
        view_limit_bytes, computed_limit_bytes: larger constants, of expansions and of what takes computing, are folded
            only if at most twice as large as what they are made of.
    """

    name: ClassVar[str] = "canonicalize"
    view_limit_bytes: int = 1 << 16
    computed_limit_bytes: int = 1 << 26

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module` into canonical form; returns whether it changed."""
        changed = drop_assertions(graph_module.graph)
        while self._round(graph_module, context):
            graph_module.graph.eliminate_dead_code()
            changed = True
        return changed

    def _round(self, module: fx.GraphModule, context: PassContext) -> bool:
        changed = ConstantFolder(module, self.name, (self.view_limit_bytes, self.computed_limit_bytes)).run(context)
        for node in list(module.graph.nodes):
            rules = (rule for rule in RULES if node.target in rule.targets)
            changed |= any(rule.apply(node, self.name, module, context) for rule in rules)
        return changed


def drop_assertions(graph: fx.Graph) -> bool:
    """Erase what has neither users nor a value: assertions and guards, all decided by static shapes."""
    calls = (node for node in graph.nodes if node.op == "call_function")
    dead = [node for node in calls if not node.users and node.meta.get("val") is None]
    for node in dead:
        graph.erase_node(node)
    return bool(dead)
