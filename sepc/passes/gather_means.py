"""gather-means: have a kernel gather the means over each row of what it writes, for a global average pooling to read.

Pattern. A region r over images, whose value v is read by a global average pooling (squeeze-and-excite) and by others.

Equation. mean over rows and columns = mean over rows of the means over columns, both of equally many elements:

    mean(v, [2, 3]) = mean(mean(v, [3]), [2])

r computes v row by row, so it can add each vector to the mean of its row; the pooling then reads 1/W of v's bytes. It
is done where the predicted time of the pooling so, and of r with the additions, is less than that of both as they are.
The means over rows are float32, whatever v is.

Preconditions. r is a chain, or a lanewise convolution with a window: those compute each row in one task (dense ones may
split it, pointwise ones have no rows). Its value has the dimensions [N, C, H, W] with H > 1, and nobody concatenates
it, for which a value must have a region of its own.

    %v = region_0_convolution(%x)                 %r = region_0_convolution(%x)    (v, mean(v, [3]))
    %m = region_1_pooling(%v)             →       %v = getitem(%r, 0)
    %y = region_2_elementwise(%v, %m)             %m = region_1_pooling(getitem(%r, 1))
                                                  %y = region_2_elementwise(%v, %m)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Argument

from sepc.cost_model.planner import Planner
from sepc.cost_model.work import Work
from sepc.ir import ops, region
from sepc.ir.anchors import anchor_of
from sepc.ir.links import CHANNELS_SECOND, analyse_chain, is_anchor, result_axes
from sepc.ir.origin import derive
from sepc.ir.problem import Problem, contiguous_strides
from sepc.ir.stage import Pooling
from sepc.passes.manager import PassContext
from sepc.passes.sequences import piece_time_us


@dataclass(frozen=True)
class GatherMeans:
    """Gives regions whose value is averaged a second result, the means over its rows."""

    name: ClassVar[str] = "gather-means"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module`; returns whether any means are gathered now."""
        planner = context.planner_for(self.name)
        changed = False
        for node, _ in list(region.regions(graph_module)):
            pools = [user for user in node.users if _averages(graph_module, user, node)]
            if not pools:
                continue
            times_us, reason = None, _obstacle(graph_module, node, pools, planner)
            if not reason:
                times_us = _times_us(_problems(region.submodule(graph_module, node)), pools, planner)
                reason = "" if times_us[1] < times_us[0] else "no gain"
            message = f"means of its rows not gathered: {reason}" if reason else "gathers the means of its rows"
            context.note(self.name, [node, *pools], message, taken=not reason, times_us=times_us)
            if not reason:
                self._gather(graph_module, node, pools)
                changed = True
        return changed

    def _gather(self, graph_module: fx.GraphModule, node: fx.Node, pools: Sequence[fx.Node]) -> None:
        """Add the means to the results of `node`, and have `pools` read them."""
        graph = region.submodule(graph_module, node)
        value = region.result(graph)
        with graph.graph.inserting_before(graph.graph.output_node()):
            means = graph.graph.call_function(ops.aten.mean.dim, (value, [3], True), _summed_in_float32(value))
        means.meta["sepc_origin"] = derive(self.name, [value])
        graph.graph.output_node().args = ((value, means),)
        graph.recompile()
        readers = list(node.users)
        with graph_module.graph.inserting_after(node):
            gathered = graph_module.graph.call_function(operator.getitem, (node, 1))
            whole = graph_module.graph.call_function(operator.getitem, (node, 0))
        for one in (whole, gathered):
            one.meta["sepc_origin"] = derive(self.name, [node])
        for reader in readers:
            reader.replace_input_with(node, gathered if reader in pools else whole)
        for pool in pools if _summed_in_float32(value) else ():
            _round_mean(region.submodule(graph_module, pool), ops.dtype(value))


def _summed_in_float32(value: fx.Node) -> dict[str, Argument]:
    """How a mean of `value` comes to be float32, where it is not anyway."""
    return {} if ops.dtype(value) == torch.float32 else {"dtype": torch.float32}


def _round_mean(graph: fx.GraphModule, dtype: torch.dtype) -> None:
    """Have the mean in a pooling's region, whose input is float32 now, be of the type that it was."""
    (mean,) = (node for node in region.computations(graph) if ops.Mean.matches(node))
    mean.update_kwarg("dtype", dtype)
    graph.recompile()


def _averages(graph_module: fx.GraphModule, user: fx.Node, value: fx.Node) -> bool:
    """Whether `user` is a region of ours that reads `value` only to average it over all rows and columns."""
    if not region.is_region(user) or region.info(user).kind != "pooling" or region.info(user).kernel != "sepc":
        return False
    graph = region.submodule(graph_module, user)
    inner = dict(zip(region.inputs(user), region.placeholders(graph), strict=True))[value]
    reads = [one for one in region.computations(graph) if inner in one.all_input_nodes]
    return len(reads) == 1 and ops.Mean.matches(reads[0]) and ops.Mean.of(reads[0]).dims == (2, 3)


def _obstacle(graph_module: fx.GraphModule, node: fx.Node, pools: Sequence[fx.Node], planner: Planner) -> str:
    """Why the region `node` cannot gather means for `pools`, or need not; empty if it can."""
    if len(pools) == len(node.users):
        return "nobody else reads the value"
    is_chain = region.info(node).kind == "chain"
    if not is_chain and not is_anchor(anchor_of(region.submodule(graph_module, node))[0]):
        return "no stage of ours computes it row by row"
    if any(region.is_region(user) and region.info(user).kind == "concatenation" for user in node.users):
        return "it is concatenated"
    graph = region.submodule(graph_module, node)
    if result_axes(graph) != CHANNELS_SECOND or ops.shape(node)[2] == 1:
        return "it is no image with rows"
    if not planner.gathers_row_means([problem.link for problem in _problems(graph)]):
        return "its rows may be split between tasks"
    return ""


def _problems(graph: fx.GraphModule) -> tuple[Problem, ...]:
    # The strides do not matter to what a link costs.
    strides = {inner: contiguous_strides(ops.shape(inner)) for inner in region.placeholders(graph)}
    return analyse_chain(graph, strides, contiguous_strides(ops.shape(region.result(graph))))


def _times_us(problems: Sequence[Problem], pools: Sequence[fx.Node], planner: Planner) -> tuple[float, float]:
    """Predicted times of the region and of the poolings, without gathering and with it."""
    last = problems[-1]
    gathering = [*problems[:-1], replace(last, row_means=last.result)]
    stage = last.link
    image = (stage.batch, stage.out_height, stage.out_width)
    whole = Pooling(*image, 1, 1, stage.out_channels, maximum=False, adaptive=True)

    def time_us(links: Sequence[Problem], pool: Pooling) -> float:
        kernel_us = piece_time_us(links, planner)
        assert kernel_us is not None, "what is one region has a kernel"
        return kernel_us + len(pools) * planner.choose(Work(pool)).cost.time_us

    return time_us(problems, whole), time_us(gathering, replace(whole, in_width=1))
