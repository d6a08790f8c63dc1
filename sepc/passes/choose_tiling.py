"""choose-tiling: let the cost model block the loops of every region that has a kernel of ours.

Pattern. A region whose values have layouts: its loop nest follows from its operators and strides (`sepc.ir.problem`).

Equation. tiling(region) = argmin over legal tilings of predicted time on the machine with the given number of threads.
With the objective "memory", chains are only tried with the smallest window, whose ring buffers take the least scratch.

Preconditions. A stage covers the region. Where none does (its tensors advance too differently to be one loop nest) the
region is handed to PyTorch, with the reason. Where the algorithms of Strassen or Winograd could compute it, it is noted
whether they do, with the predicted times of the plain form and of theirs.

    region_0_convolution            →    region_0_convolution, meta["sepc_tiling"] = Choice(tiling, cost)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from sepc.cost_model.chain import Objective
from sepc.cost_model.planner import Planner
from sepc.cost_model.search import Choice
from sepc.cost_model.tiling import ProductTiling
from sepc.cost_model.work import Work
from sepc.errors import VerificationError
from sepc.ir import region
from sepc.ir.anchors import UnsupportedRegionError
from sepc.ir.layout import layout
from sepc.ir.links import analyse_chain
from sepc.ir.problem import Problem, analyse, copy_problem
from sepc.ir.stage import Map, Stage
from sepc.passes.manager import PassContext
from sepc.passes.sequences import work_of


@dataclass(frozen=True)
class ChooseTiling:
    """Annotates regions with the `Choice` of the cost model."""

    name: ClassVar[str] = "choose-tiling"
    objective: Objective = "time"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Annotate the regions of `graph_module`; counts as a change only where a region was handed to PyTorch."""
        planner = context.planner_for(self.name)
        handed_over = False
        for node, graph in region.regions(graph_module):
            if region.info(node).kernel != "sepc":
                continue
            try:
                found = _choose(node, graph, planner, self.objective)
                node.meta["sepc_tiling"] = found
                _note_algorithms(node, found, context)
            except UnsupportedRegionError as error:
                node.meta["sepc_region"] = replace(region.info(node), kernel="torch", reason=str(error))
                context.note(self.name, node, str(error))
                handed_over = True
        return handed_over


def _note_algorithms(node: fx.Node, found: Choice, context: PassContext) -> None:
    """Record, for a region that fast algorithms could compute, which of them does, or does not, and why."""
    every = (found, *found.others)
    plain_us = next((one.cost.time_us for one in every if not isinstance(one.tiling, ProductTiling)), None)
    for one in every:
        if isinstance(one.tiling, ProductTiling):
            time_us, by = one.cost.time_us, f"by {one.tiling.algorithm}"
            if one is not found:
                gains = plain_us is not None and time_us < plain_us
                by = f"not {by}: {'too small a gain, or another gains more' if gains else 'no gain'}"
            times_us = None if plain_us is None else (plain_us, time_us)
            context.note(ChooseTiling.name, node, by, taken=one is found, times_us=times_us)


def choice(node: fx.Node) -> Choice:
    """The tiling chosen for a region and its predicted cost; raises VerificationError where there is none."""
    found = node.meta.get("sepc_tiling")
    if not isinstance(found, Choice):
        raise VerificationError("A region has no tiling", where=node.name, why="meta['sepc_tiling'] is missing")
    return found


def region_problem(node: fx.Node, graph: fx.GraphModule) -> Problem:
    """The loop nest of the region that `node` calls, with the strides planned for its tensors."""
    given = [layout(value).strides for value in region.inputs(node)]
    return analyse(graph, dict(zip(region.placeholders(graph), given, strict=True)), *_result_strides(node))


def chain_problems(node: fx.Node, graph: fx.GraphModule) -> tuple[Problem, ...]:
    """The loop nests of the chain that `node` calls, with the strides planned for its tensors."""
    given = [layout(value).strides for value in region.inputs(node)]
    return analyse_chain(graph, dict(zip(region.placeholders(graph), given, strict=True)), *_result_strides(node))


def _result_strides(node: fx.Node) -> list[tuple[int, ...]]:
    return [layout(owner).strides for owner in region.owners(node)]


def _largest_copy(node: fx.Node) -> Stage:
    """The largest copy that a concatenation makes, whose tiling serves for all; one element if it makes none."""
    copies: list[Stage] = [
        copy_problem(value, layout(value).strides, layout(node).strides).link
        for value in region.inputs(node)
        if layout(value).base is not node
    ]
    return max(copies, key=lambda copy: copy.flops, default=Map((1,)))


def _choose(node: fx.Node, graph: fx.GraphModule, planner: Planner, objective: Objective) -> Choice:
    if region.info(node).kind == "concatenation":
        return planner.choose(Work(_largest_copy(node)))
    if region.info(node).kind == "chain":
        found = planner.choose_chain([work_of(problem) for problem in chain_problems(node, graph)], objective)
        if found is None:
            raise UnsupportedRegionError("there is no kernel of all of it on this machine")
        return found
    return planner.choose(work_of(region_problem(node, graph)), objective)
