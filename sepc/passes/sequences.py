"""Sequences of regions that could be one chain, and what pieces of them cost: what `fuse` and `recompute` decide by.

Regions r₁ → r₂ → … → rₙ over images of several rows, each the only reader of the one before it, which it reads as the
input of its anchor only. Permutes may lie between two, if all agree which dimension holds the channels. The first one
may be elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import fx

from sepc.cost_model.chain import Objective
from sepc.cost_model.planner import Planner
from sepc.cost_model.work import Work
from sepc.ir import layers, ops, region
from sepc.ir.anchors import anchor_of, unpadded
from sepc.ir.convolution import Convolution
from sepc.ir.links import RANK, analyse_chain, fits, image_axes, is_anchor
from sepc.ir.problem import Problem, contiguous_strides
from sepc.ir.stage import Map, Stage


@dataclass(frozen=True)
class RegionSequence:
    """Regions that may be joined, the permutes in front of each, and their loop nests."""

    nodes: Sequence[fx.Node]
    views: Sequence[Sequence[fx.Node]]
    links: Sequence[Problem]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, nodes: Sequence[fx.Node], views: Sequence[Sequence[fx.Node]]) -> Self:
        """Of the regions `nodes`, with `views` in front of each."""
        every = [one for node, own in zip(nodes, views, strict=True) for one in (*own, node)]
        joined, _ = region.join(graph_module, every)
        # The strides do not matter to what a link costs.
        strides = {inner: contiguous_strides(ops.shape(inner)) for inner in region.placeholders(joined)}
        return cls(nodes, views, analyse_chain(joined, strides, contiguous_strides(ops.shape(nodes[-1]))))

    def piece(self, begin: int, end: int) -> list[fx.Node]:
        """The regions from `begin` to `end`, with the permutes between them."""
        between = [(), *self.views[begin + 1 : end]]
        return [one for own, node in zip(between, self.nodes[begin:end], strict=True) for one in (*own, node)]


def find_sequences(graph_module: fx.GraphModule) -> Iterator[RegionSequence]:
    """The longest runs of two or more regions, each the only reader of the one before it."""
    seen: set[fx.Node] = set()
    for node, _ in region.regions(graph_module):
        if node in seen or not starts_a_sequence(graph_module, node):
            continue
        nodes, views = [node], [list[fx.Node]()]
        while (following := _only_reader(graph_module, nodes[-1])) is not None:
            nodes.append(following[0])
            views.append(following[1])
        seen.update(nodes)
        if len(nodes) > 1:
            yield RegionSequence.of(graph_module, nodes, views)


def starts_a_sequence(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the region `node` could be the first link of a chain."""
    return is_link(graph_module, node) or _scales_an_image(graph_module, node)


def is_link(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a region of ours over images of several rows, and what it hangs on can be a link."""
    if region.info(node).kernel != "sepc":
        return False
    anchor, _ = anchor_of(region.submodule(graph_module, node))
    shape = ops.shape(anchor)
    if (
        not is_anchor(anchor)
        or len(shape) != RANK
        or (layers.Pool.matches(anchor) and layers.Pool.of(anchor).output_size)
    ):
        return False
    return shape[image_axes(anchor).index(1)] > 1


def _scales_an_image(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is an elementwise region all of whose operands of full size lie with their channels innermost."""
    if region.info(node).kind != "elementwise" or region.info(node).kernel != "sepc" or len(ops.shape(node)) != RANK:
        return False
    full = [value for value in region.inputs(node) if ops.shape(value) == ops.shape(node)]
    return bool(full) and all(region.is_region(value) and region.info(value).kernel == "sepc" for value in full)


def _only_reader(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The region that alone reads `node` and could be the next link, and the permutes on the way to it."""
    user = _only_user(node)
    return None if user is None else following_link(graph_module, node, user)


def following_link(graph_module: fx.GraphModule, node: fx.Node, user: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The region to which `user`, which reads region `node`, leads, and the permutes on the way to it.

    None where that region could not be the next link after `node`.
    """
    views: list[fx.Node] = []
    reader: fx.Node | None = user
    while reader is not None and ops.Permute.matches(reader):
        views.append(reader)
        reader = _only_user(reader)
    if reader is None or not region.is_region(reader) or not is_link(graph_module, reader):
        return None
    value = views[-1] if views else node
    graph = region.submodule(graph_module, reader)
    inner = dict(zip(region.inputs(reader), region.placeholders(graph), strict=True))[value]
    anchor, _ = anchor_of(graph)
    reads = [one for one in region.computations(graph) if inner in one.all_input_nodes]
    is_input = unpadded(anchor.all_input_nodes[0]) is inner and region.inputs(reader).count(value) == 1
    fitting = is_input and len(reads) == 1 and fits(region.submodule(graph_module, node), views, anchor)
    return (reader, views) if fitting else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def work_of(problem: Problem) -> Work:
    """What a planner is asked about `problem`."""
    packed = problem.factor is None
    return Work(problem.stage, problem.epilogue_cost, problem.operand_bytes, problem.mixing, packed)


def piece_time_us(links: Sequence[Problem], planner: Planner, objective: Objective = "time") -> float | None:
    """Predicted time of `links` as one kernel, with what passes until the next; None if no kernel computes them."""
    works = [work_of(link) for link in links]
    if len(links) > 1:
        found = planner.choose_chain(works, objective)
    else:
        found = planner.choose(replace(works[0], stage=_alone(works[0].link)), objective)
    return None if found is None else found.cost.time_us + planner.between_us


def _alone(stage: Stage) -> Stage:
    """A stage that treats each pixel by itself as the one long row of pixels that it is when it stands alone."""
    if isinstance(stage, Map):
        return replace(stage, extents=(math.prod(stage.extents[:-1]), stage.out_channels))
    if not isinstance(stage, Convolution) or stage.taps != 1 or stage.stride != (1, 1) or stage.padding != (0, 0):
        return stage
    return replace(stage, batch=1, in_height=1, in_width=stage.pixels, out_height=1, out_width=stage.pixels)
