"""Regions of planned models, each ready to be lowered and predicted under any tiling."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Final

import torch
from torch import fx, nn

from sepc.cost_model.chain import predict_chain, stage_blocks, window_steps
from sepc.cost_model.cycles import compute_cycles
from sepc.cost_model.latency import Cost, predict
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import Choice, candidates
from sepc.cost_model.tiling import ChainTiling, LinkTiling, Tiling
from sepc.frontend.export import capture
from sepc.ir import ops, region
from sepc.ir.layout import layout, storage_elements
from sepc.ir.links import chain_of
from sepc.ir.problem import Problem
from sepc.ir.views import is_view
from sepc.passes.choose_tiling import chain_problems, choice, region_problem
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE
from sepc.target import Target

FLOAT_BYTES: Final = 4
SENSIBLE_ARITHMETIC: Final = 2.0
"""Register blocks whose arithmetic is predicted to take longer than this times the quickest's are not worth timing."""


@dataclass(frozen=True)
class Region:
    """One region of ours.

    Attributes:
        name: the region's name in its model. kind: as in `sepc.ir.region.RegionInfo`.
        graph: its operators. problems: its loop nests, one unless it is a chain.
        chosen: what the cost model chose.
        input_elements: elements that it may read from each input's address on. result_elements: of its result.
        inputs: the names of the values that own its inputs' memory.
    """

    name: str
    kind: str
    graph: fx.GraphModule
    problems: tuple[Problem, ...]
    chosen: Choice
    input_elements: tuple[int, ...]
    result_elements: int
    inputs: tuple[str, ...] = ()

    @property
    def key(self) -> object:
        """Equal for regions that are the same work."""
        return tuple((p.stage, p.epilogue_cost, tuple(p.operands.values())) for p in self.problems)

    @property
    def operand_bytes(self) -> int:
        """Bytes of the tensors that its elementwise operators read."""
        return sum(FLOAT_BYTES * ops.tensor(node).numel() for problem in self.problems for node in problem.operands)

    def predict(self, tiling: Tiling, machine: Machine, threads: int) -> Cost:
        """The model's cost under `tiling`."""
        if isinstance(tiling, ChainTiling):
            costs = tuple(problem.epilogue_cost for problem in self.problems)
            return predict_chain(chain_of(self.problems), tiling, machine, threads, costs, self.operand_bytes)
        (problem,) = self.problems
        return predict(
            problem.link,
            tiling,
            machine,
            threads,
            epilogue_cost=problem.epilogue_cost,
            operand_bytes=self.operand_bytes,
        )

    def alternatives(self, machine: Machine, threads: int, count: int, generator: random.Random) -> list[Tiling]:
        """Up to `count` other tilings: a third the most promising ones by the model, the others at random.

        The random ones have register blocks of sensible arithmetic, else most of them would be no competition.
        """
        if isinstance(self.chosen.tiling, ChainTiling):
            every = self._chain_tilings(machine)
        else:
            (problem,) = self.problems
            every = candidates(problem.link, machine, threads, mixing=problem.mixing)
            cycles = [compute_cycles(problem.link, tiling, machine, problem.epilogue_cost) for tiling in every]
            limit = SENSIBLE_ARITHMETIC * min(cycles)
            every = [tiling for tiling, own in zip(every, cycles, strict=True) if own <= limit]
        every = [tiling for tiling in dict.fromkeys(every) if tiling != self.chosen.tiling]
        every.sort(key=lambda tiling: self.predict(tiling, machine, threads).time_us)
        best, rest = every[: count // 3], every[count // 3 :]
        return best + generator.sample(rest, min(len(rest), count - len(best)))

    def _chain_tilings(self, machine: Machine) -> list[Tiling]:
        """Chain tilings of the best blocks of each link, by arithmetic, with all windows and tasks."""
        chain = chain_of(self.problems)
        height = chain.links[-1].out_height
        blocks: list[list[LinkTiling]] = []
        for problem, link in zip(self.problems, chain.links, strict=True):
            own = stage_blocks(link, machine)
            cycles = {block: compute_cycles(link, block, machine, problem.epilogue_cost) for block in own}
            blocks.append(sorted(own, key=cycles.__getitem__)[:3])
        choices = [tuple(own[0] for own in blocks)]
        for index, own in enumerate(blocks):
            choices += [(*choices[0][:index], other, *choices[0][index + 1 :]) for other in own[1:]]
        rows = sorted({max(1, height // parts) for parts in (1, 2, 3, 4, 6, 8)})
        return [ChainTiling(links, row, step) for links in choices for row in rows for step in window_steps(row)]


def captured(module: nn.Module, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The ATen graph of `module`, its inputs typed with the strides that they have."""
    graph_module = capture(module.eval(), inputs).graph_module
    for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = node.meta["val"].as_strided(value.shape, value.stride())
    return graph_module


def run_passes(
    graph_module: fx.GraphModule, target: Target, threads: int, first: str, last: str, *, without: Sequence[str] = ()
) -> None:
    """Run the compiler's passes from `first` to `last`, leaving out those named by `without`."""
    names = [one.name for one in PIPELINE]
    chosen = PIPELINE[names.index(first) : names.index(last) + 1]
    context = PassContext(target=target, machine=target.planned_for, threads=threads)
    PassManager([one for one in chosen if one.name not in without]).run(graph_module, context)


def with_machine(target: Target, machine: Machine) -> Target:
    """`target` with other figures for the cost model."""
    return replace(target, machine=machine)


def own_regions(graph_module: fx.GraphModule, kinds: Sequence[str] = ()) -> Iterator[Region]:
    """The regions with a tiling and a kernel of ours, of the given kinds (all but concatenations by default)."""
    for node, graph in region.regions(graph_module):
        info = region.info(node)
        if info.kernel != "sepc" or info.kind == "concatenation" or (kinds and info.kind not in kinds):
            continue
        is_chain = info.kind == "chain"
        problems = chain_problems(node, graph) if is_chain else (region_problem(node, graph),)
        values = region.inputs(node)
        yield Region(
            node.name,
            info.kind,
            graph,
            problems,
            choice(node),
            tuple(storage_elements(ops.shape(value), layout(value).strides) for value in values),
            storage_elements(ops.shape(region.owners(node)[0]), layout(region.owners(node)[0]).strides),
            tuple(layout(value).base.name for value in values),
        )


def extract_piece(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph of its own that does what `nodes` do, regions and views, and returns what the last one does.

    Its inputs have the layouts planned for them in `graph_module`.
    """
    graph, owner = fx.Graph(), nn.Module()
    known: dict[fx.Node, fx.Node] = {}
    for value in dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value not in nodes):
        known[value] = graph.placeholder(value.name)
        known[value].meta["val"] = value.meta["val"].as_strided(ops.shape(value), layout(value).strides)
    for node in nodes:
        if region.is_region(node):
            owner.add_module(str(node.target), region.submodule(graph_module, node))
        known[node] = graph.node_copy(node, known.__getitem__)
    graph.output((known[nodes[-1]],))
    return fx.GraphModule(owner, graph)


def merge_all(graph_module: fx.GraphModule) -> None:
    """Make one chain of all regions of `graph_module` and the views between, each the only reader of the one before."""
    nodes = [node for node in graph_module.graph.nodes if region.is_region(node) or is_view(node)]
    nodes = list(dropwhile(is_view, nodes))
    region.merge(graph_module, nodes, "region_0_chain", region.RegionInfo("chain"), "benchmark")
