"""Strides of replacements: rules must keep those of what they replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sepc.ir.ops import aten, shape, strides
from sepc.ir.types import same_type
from sepc.passes.rewriter import Rewriter


def stored_as(node: fx.Node, result: fx.Node, build: Rewriter) -> fx.Node:
    """`result`, dense, with its dimensions stored in the order in which those of `node` are."""
    if same_type(node.meta["val"], result.meta["val"]):
        return result
    order: list[Any] = sorted(range(len(shape(node))), key=lambda dim: -strides(node)[dim])
    moved = permuted(result, order, build)
    stored = build.call(aten.clone.default, moved, memory_format=torch.contiguous_format)
    return permuted(stored, [order.index(dim) for dim in range(len(order))], build)


def permuted(value: fx.Node, order: list[Any], build: Rewriter) -> fx.Node:
    """`value` with dimension ``order[d]`` moved to place d; itself where none moves."""
    return value if order == sorted(order) else build.call(aten.permute.default, value, order)
