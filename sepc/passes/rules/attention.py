"""Attention in its parts: two products and a softmax, which have stages of their own.

Pattern and equation. For q [..., M, K], k [..., N, K], v [..., N, O],

    scaled_dot_product_attention(q, k, v, mask, scale=s)    →    matmul(softmax(matmul(q, kᵀ) · s + mask), v)

where s is 1/√K if it is not given, and the result is stored in the order of dimensions in which the operator stores it.

Preconditions. No dropout, no causal mask, as many heads of k and v as of q; a mask is added, it is not of truth values.
"""

from __future__ import annotations

import math

from torch import fx

from sepc.ir.ops import arguments, aten, dtype, shape
from sepc.passes.rewriter import Rejection, Rewriter, Rule
from sepc.passes.rules.storage import stored_as


class AttentionInParts(Rule[fx.Node]):
    """Scaled dot product attention as products and a softmax."""

    targets = (aten.scaled_dot_product_attention.default,)

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | Rejection | None:
        """The node, if it has the form above."""
        named = arguments(node)
        obstacles = {
            "it drops values at random": named["dropout_p"] != 0.0,
            "its mask is causal": named["is_causal"],
            "its heads share keys": named["enable_gqa"],
            "its mask is not added": named["attn_mask"] is not None and dtype(named["attn_mask"]) != dtype(node),
            "it is one matrix": len(shape(node)) < 3,
        }
        found = next((reason for reason, holds in obstacles.items() if holds), None)
        return node if found is None else Rejection(found)

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        """The product of the weights with v."""
        named = arguments(match)
        query, key, value = (named[name] for name in ("query", "key", "value"))
        scale = named["scale"] if named["scale"] is not None else 1 / math.sqrt(shape(query)[-1])
        rank = len(shape(key))
        transposed = build.call(aten.permute.default, key, [*range(rank - 2), rank - 1, rank - 2])
        scores = build.call(aten.mul.Tensor, build.call(aten.matmul.default, query, transposed), scale)
        if named["attn_mask"] is not None:
            scores = build.call(aten.add.Tensor, scores, named["attn_mask"])
        result = build.call(aten.matmul.default, build.call(aten.softmax.int, scores, rank - 1), value)
        return stored_as(match, result, build)
