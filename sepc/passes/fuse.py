"""fuse: make one region of neighbouring convolutions where moving less memory is worth more than computing rows twice.

Pattern. Convolution regions r₁ → r₂ → … → rₙ, each the only reader of the one before it.

Equation. cost(r₁ … rₙ) = min over cuts of Σ cost(piece): the shortest path through the points between the regions, an
edge from i to j being the regions rᵢ₊₁ … rⱼ as one kernel. One region costs what its best tiling costs; several cost
what their best chain tiling costs, in which each link's rows stay in a ring buffer (`sepc.backends.stages.chain`).
With the objective "memory", bytes come first: with peak(piece) the bytes in use while a piece runs, its ring buffers
included, only the pieces of peak ≤ limit are edges, where limit is the least that the whole graph can do with,

    limit = max over sequences (min over cuts max over pieces peak(piece)),  and the peaks of all other regions.

Preconditions. Images with rows (4-D, and more than one row each), no permute inside, and the reader takes the value as
the input of its convolution only. One link at least has a window (a pure chain of pointwise convolutions has no rows to
share). Each edge that is not taken is noted, with what it would have gained or lost.

    %a = region_0_convolution(%x)      1×1, clamp
    %b = region_1_convolution(%a)      depthwise, clamp      →      %c = region_0_chain(%x)
    %c = region_2_convolution(%b, %x)  1×1, add
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import ClassVar, Final

import networkx as nx
from torch import fx

from sepc.cost_model.chain import Objective, choose_chain
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import choose
from sepc.errors import VerificationError
from sepc.ir import ops, region
from sepc.ir.problem import Problem, analyse_chain, chain_of, channels_last_order, contiguous_strides, unpadded
from sepc.ir.stage import Convolution
from sepc.passes.live_bytes import LiveBytes
from sepc.passes.manager import PassContext

FLOAT_BYTES = 4
LONGEST: Final[Mapping[Objective, int]] = {"time": 3, "memory": 5}
"""Links of a chain at most, as generating the code of one takes longer with each."""


@dataclass(frozen=True)
class Fuse:
    """Joins convolution regions into chains where the cost model predicts a gain, or where it takes less memory."""

    name: ClassVar[str] = "fuse"
    objective: Objective = "time"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module`; returns whether anything was fused."""
        if context.machine is None:
            raise VerificationError("fuse needs a machine", fix="set PassContext.machine")
        sequences = [_Sequence.of(graph_module, nodes) for nodes in _sequences(graph_module)]
        ways = [self._ways(sequence, context.machine, context.threads) for sequence in sequences]
        if self.objective == "memory":
            _keep_small(graph_module, sequences, ways, context)
        count = 0
        for sequence, graph in zip(sequences, ways, strict=True):
            for begin, end in _cut(sequence, graph, context):
                if end - begin > 1:
                    piece = sequence.nodes[begin:end]
                    region.merge(graph_module, piece, f"region_{count}_chain", region.RegionInfo("chain"), self.name)
                    count += 1
        return count > 0

    def _ways(self, sequence: _Sequence, machine: Machine, threads: int) -> nx.DiGraph[int]:
        """The ways through a sequence: from point to point between its regions, an edge for what may be one kernel."""
        ways: nx.DiGraph[int] = nx.DiGraph()
        links = sequence.links
        for begin, end in combinations(range(len(links) + 1), 2):
            if end - begin == 1 or (end - begin <= LONGEST[self.objective] and _has_window(links[begin:end])):
                time_us = _time_us(links[begin:end], machine, threads, self.objective)
                ways.add_edge(begin, end, time_us=time_us)
        return ways


@dataclass(frozen=True)
class _Sequence:
    """Regions that may be joined, and their loop nests."""

    nodes: Sequence[fx.Node]
    links: Sequence[Problem]

    @staticmethod
    def of(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> _Sequence:
        return _Sequence(nodes, [_link(graph_module, node) for node in nodes])


def _cut(sequence: _Sequence, ways: nx.DiGraph[int], context: PassContext) -> list[tuple[int, int]]:
    """The pieces of the quickest of the `ways` through a sequence, as half-open ranges."""
    path = nx.shortest_path(ways, 0, len(sequence.nodes), weight="time_us")
    taken = list(pairwise(path))
    for begin, end in ways.edges:
        alone = [(index, index + 1) for index in range(begin, end)]
        if end - begin > 1 and (begin, end) not in taken and all(ways.has_edge(*edge) for edge in alone):
            gain_us = sum(ways.edges[edge]["time_us"] for edge in alone) - ways.edges[begin, end]["time_us"]
            first, last = sequence.nodes[begin], sequence.nodes[end - 1]
            message = f"{first.name}…{last.name} not fused: predicted gain over single kernels {gain_us:.1f} µs"
            context.note(Fuse.name, first, message)
    return taken


def _keep_small(
    graph_module: fx.GraphModule, sequences: Sequence[_Sequence], ways: Sequence[nx.DiGraph[int]], context: PassContext
) -> None:
    """Remove from `ways` every piece that takes more memory than the graph has to take somewhere."""
    live = LiveBytes.of(graph_module)
    inside = {node for sequence in sequences for node in sequence.nodes}
    limit = max((live.during([node]) for node, _ in region.regions(graph_module) if node not in inside), default=0)
    for sequence, graph in zip(sequences, ways, strict=True):
        for begin, end in graph.edges:
            rings = chain_of(sequence.links[begin:end]).ring_elements(step=1)
            peak = live.during(sequence.nodes[begin:end]) + context.threads * FLOAT_BYTES * sum(rings)
            graph.edges[begin, end]["peak_bytes"] = peak
        limit = max(limit, _least_peak(graph, len(sequence.nodes)))
    for sequence, graph in zip(sequences, ways, strict=True):
        for begin, end in list(graph.edges):
            peak = graph.edges[begin, end]["peak_bytes"]
            if peak > limit:
                graph.remove_edge(begin, end)
                names = "…".join(node.name for node in sequence.nodes[begin:end])
                context.note(Fuse.name, sequence.nodes[begin], f"{names} not a kernel: {peak} bytes, limit {limit}")


def _least_peak(ways: nx.DiGraph[int], end: int) -> int:
    """The least peak of any way from point 0 to `end`."""
    least = {0: 0}
    for point in range(1, end + 1):
        least[point] = min(
            max(least[begin], ways.edges[begin, point]["peak_bytes"]) for begin in ways.predecessors(point)
        )
    return least[end]


def _sequences(graph_module: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """The longest runs of two or more convolution regions, each the only reader of the one before it."""
    seen: set[fx.Node] = set()
    for node, _ in region.regions(graph_module):
        if node in seen or not _is_candidate(graph_module, node):
            continue
        sequence = [node]
        while (reader := _only_reader(graph_module, sequence[-1])) is not None:
            sequence.append(reader)
        seen.update(sequence)
        if len(sequence) > 1:
            yield sequence


def _is_candidate(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a convolution region over images with rows, without a permute inside."""
    if not region.is_region(node) or region.info(node).kind != "convolution" or len(ops.shape(node)) != 4:
        return False
    inside = region.computations(region.submodule(graph_module, node))
    return ops.shape(node)[2] > 1 and not any(ops.Permute.matches(inner) for inner in inside)


def _only_reader(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The candidate that is the only reader of `node` and convolves it, if there is one."""
    readers = list(node.users)
    if len(readers) != 1 or not _is_candidate(graph_module, readers[0]):
        return None
    graph = region.submodule(graph_module, readers[0])
    inner = dict(zip(region.inputs(readers[0]), region.placeholders(graph), strict=True))[node]
    convolution = next(one for one in region.computations(graph) if ops.Conv.matches(one))
    reads = [one for one in region.computations(graph) if inner in one.all_input_nodes]
    is_input = unpadded(ops.Conv.of(convolution).input) is inner and region.inputs(readers[0]).count(node) == 1
    return readers[0] if is_input and len(reads) == 1 else None


def _link(graph_module: fx.GraphModule, node: fx.Node) -> Problem:
    """The loop nest of a convolution region, all of whose tensors lie channels-last."""
    graph = region.submodule(graph_module, node)

    def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
        return contiguous_strides(shape, channels_last_order(len(shape)) if len(shape) > 1 else None)

    strides = {inner: channels_last(ops.shape(inner)) for inner in region.placeholders(graph)}
    (problem,) = analyse_chain(graph, strides, channels_last(ops.shape(node)))
    return problem


def _has_window(links: Sequence[Problem]) -> bool:
    return any(isinstance(link.stage, Convolution) and link.stage.kernel[0] > 1 for link in links)


def _time_us(links: Sequence[Problem], machine: Machine, threads: int, objective: Objective) -> float:
    """Predicted time of `links` as one kernel, its barrier included."""
    barrier_us = machine.barrier_us if threads > 1 else 0.0
    costs = tuple(link.epilogue_cost for link in links)
    operands = [node for link in links for node in link.operands]
    operand_bytes = sum(FLOAT_BYTES * ops.tensor(node).numel() for node in operands)
    chain = chain_of(links)
    if len(links) > 1:
        found = choose_chain(
            chain, machine, threads, epilogue_costs=costs, operand_bytes=operand_bytes, objective=objective
        )
    else:
        stage = _one_row(chain.links[0])
        found = choose(stage, machine, threads, epilogue_cost=costs[0], operand_bytes=operand_bytes)
    return found.cost.time_us + barrier_us


def _one_row(conv: Convolution) -> Convolution:
    """A pointwise convolution as the one long row of pixels that it is when it stands alone."""
    if conv.taps != 1 or conv.stride != (1, 1) or conv.padding != (0, 0):
        return conv
    return replace(conv, batch=1, in_height=1, in_width=conv.pixels, out_height=1, out_width=conv.pixels)
