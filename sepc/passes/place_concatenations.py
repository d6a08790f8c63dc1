"""place-concatenations: have the inputs of a concatenation written where the concatenation wants them.

Pattern.

    v = cat([u₀, …, uₙ], dim)

Equation. The part of v that holds uᵢ is v[offset : offset + size] along `dim`: a tensor with the strides of v. If the
region that computes uᵢ writes there, nothing is left to copy; other readers of uᵢ read the same part.

Preconditions on uᵢ. It is the result of a region of ours (PyTorch and TVM write densely) that is no concatenation
itself and has not been placed in another one, it occurs once, it is not a result of the graph, no view of it exists,
and the order of its dimensions in memory is that of v, so that its readers still find channels side by side.

    %u = region_0_convolution(%x)             layout dense                 →    layout: part of %v's storage
    %v = region_1_concatenation(%u, %w)       copies %u and %w             →    copies %w only
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from sepc.ir import ops, region
from sepc.ir.layout import Layout, layout
from sepc.passes.manager import PassContext


@dataclass(frozen=True)
class PlaceConcatenations:
    """Changes the layouts of values that are concatenated."""

    name: ClassVar[str] = "place-concatenations"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Re-annotate `graph_module`, whose nodes stay as they are; returns whether any value was placed."""
        placed = False
        for node, graph in region.regions(graph_module):
            if region.info(node).kind != "concatenation" or region.info(node).kernel != "sepc":
                continue
            found = parts(node, graph)
            for value, offset in found:
                # A region has one placeholder for a value, however often it is concatenated.
                twice = [part for part, _ in found].count(value) > 1
                if reason := "it occurs twice" if twice else next(_obstacles(value, node), ""):
                    context.note(self.name, value, f"not written into {node.name}: {reason}")
                else:
                    context.note(self.name, value, f"written into {node.name}", taken=True)
                    value.meta["sepc_layout"] = Layout(layout(node).strides, offset, node)
                    placed = True
        return placed


def parts(node: fx.Node, graph: fx.GraphModule) -> list[tuple[fx.Node, int]]:
    """The inputs of concatenation `node` and where in its result each begins, in elements."""
    cat = ops.Cat.of(region.computations(graph)[0])
    outer = dict(zip(region.placeholders(graph), region.inputs(node), strict=True))
    stride, start = layout(node).strides[cat.dim], 0
    found = []
    for inner in cat.inputs:
        if inner in outer:
            found.append((outer[inner], start * stride))
        start += ops.shape(inner)[cat.dim]
    return found


def _obstacles(value: fx.Node, node: fx.Node) -> Iterator[str]:
    """Why `value` cannot be written straight into concatenation `node`: the first reason is the one to report."""
    if not region.is_region(value) or layout(value).base is not value:
        yield "it is not the result of a region with a storage of its own"
    if region.info(value).kind == "concatenation":
        yield "it is a concatenation itself"
    if region.info(value).kernel != "sepc":
        yield f"it is computed by {region.info(value).kernel}, densely"
    if any(user.op == "output" for user in value.users):
        yield "it is a result of the graph"
    others = [user for user in value.users if user is not node]
    if not all(region.is_region(user) for user in others):
        yield "there are views of it"
    if any(region.info(user).kernel != "sepc" for user in others):
        yield "PyTorch or TVM reads it, densely"
    if _order(value) != _order(node):
        yield "its dimensions lie in another order"


def _order(node: fx.Node) -> list[int]:
    """Dimensions of more than one element, outermost in memory first."""
    dims = [dim for dim, size in enumerate(ops.shape(node)) if size > 1]
    return sorted(dims, key=lambda dim: layout(node).strides[dim], reverse=True)
