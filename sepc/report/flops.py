"""Floating-point operations of a graph, counted alike whoever computes it: of convolutions and matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from sepc.ir import ops, region


def count_flops(graph: fx.GraphModule) -> int:
    """Floating-point operations of the convolutions and matrix products of a region's graph, without computing it."""
    arguments = [torch.empty_like(ops.tensor(node), device="meta") for node in region.placeholders(graph)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _OnMeta(graph).run(*arguments)
    return int(counter.get_total_flops())


class _OnMeta(fx.Interpreter):
    """Runs a graph on tensors without data."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """A constant, as a tensor without data."""
        return torch.empty_like(super().get_attr(target, args, kwargs), device="meta")
