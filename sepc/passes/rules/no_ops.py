"""An operator that gives back its input is dropped.

Pattern and equation.

    clone(x), detach(x), x.contiguous(), x.to(dtype of x)          →    x
    view(x, shape of x), permute(x, identity), expand, full slice  →    x
    dropout(x) in eval, pad(x, zeros), cat([x])                    →    x
    x + 0, x - 0, x * 1, x / 1                                     →    x

Preconditions. Shape, dtype and strides stay. A copy that is a result of the graph stays: the caller may write to it.
"""

from __future__ import annotations

from torch import fx

from sepc.ir.ops import Binary, Pad, Permute, arguments, aten, is_op, shape
from sepc.ir.types import same_type
from sepc.passes.rewriter import Rejection, Rewriter, Rule


class DropNoOp(Rule[fx.Node]):
    """An operator that gives back its input."""

    copies = (aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default)
    # These give back their input whenever the type stays.
    by_type = (
        *(*copies, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh.default),
        *(aten.to.dtype, aten.to.dtype_layout, aten.view.default, aten._unsafe_view.default, aten.reshape.default),
        *(aten.expand.default, aten.slice.Tensor),
    )
    dropouts = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
    targets = (*by_type, *dropouts, *Permute.targets, *Pad.targets, *Binary.targets, aten.cat.default)

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | Rejection | None:
        named = arguments(node)
        source = named["tensors"][0] if "tensors" in named else named.get("self", named.get("input"))
        if not isinstance(source, fx.Node) or not self._is_identity(node, source):
            return None
        if not same_type(node.meta["val"], source.meta["val"]):
            return None
        if node.target in self.copies and any(user.op == "output" for user in node.users):
            return Rejection("it is an output, which must be a tensor of its own")
        return source

    def _is_identity(self, node: fx.Node, source: fx.Node) -> bool:
        if node.target in self.dropouts:
            named = arguments(node)
            return not named["train"] or named["p"] == 0
        if Permute.matches(node):
            return Permute.of(node).dims == tuple(range(len(shape(node))))
        if Pad.matches(node):
            return not any((*Pad.of(node).before, *Pad.of(node).after))
        if Binary.matches(node):
            binary = Binary.of(node)
            neutral = 1 if binary.kind in ("mul", "div") else 0
            return isinstance(binary.other, int | float) and binary.other * binary.alpha == neutral
        return not is_op(node, aten.cat.default) or len(arguments(node)["tensors"]) == 1

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        return match
