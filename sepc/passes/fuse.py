"""fuse: make one region of neighbouring ones where moving less memory is worth more than computing rows twice.

Pattern. Regions r₁ → r₂ → … → rₙ over images, each the only reader of the one before it (`sepc.passes.sequences`).

Equation. cost(r₁ … rₙ) = min over cuts of Σ cost(piece): the shortest path through the points between the regions, an
edge from i to j being the regions rᵢ₊₁ … rⱼ as one kernel. One region costs what its best tiling costs; several cost
what their best chain tiling costs, in which each link's rows stay in a ring buffer (`sepc.backends.stages.chain`), or
on a GPU in shared memory; what no kernel computes is no edge.
With the objective "memory", bytes come first: with peak(piece) the bytes in use while a piece runs, its ring buffers
included, only the pieces of peak ≤ limit are edges, where limit is the least that the whole graph can do with,

    limit = max over sequences (min over cuts max over pieces peak(piece)),  and the peaks of all other regions.

Preconditions. At most `LONGEST` links. Each edge of several regions is noted, taken or not, with the predicted times of
its regions apart and as one kernel.

    %a = region_0_convolution(%x)      1×1, clamp
    %b = region_1_convolution(%a)      depthwise, clamp      →      %c = region_0_chain(%x)
    %c = region_2_convolution(%b, %x)  1×1, add
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import ClassVar, Final

import networkx as nx
from torch import fx

from sepc.cost_model.chain import Objective
from sepc.cost_model.planner import Planner
from sepc.ir import region
from sepc.passes.live_bytes import LiveBytes
from sepc.passes.manager import PassContext
from sepc.passes.sequences import RegionSequence, find_sequences, piece_time_us, work_of

LONGEST: Final[Mapping[Objective, int]] = {"time": 4, "memory": 5}
"""Links of a chain at most, as generating the code of one takes longer with each."""


@dataclass(frozen=True)
class Fuse:
    """Joins convolution regions into chains where the cost model predicts a gain, or where it takes less memory."""

    name: ClassVar[str] = "fuse"
    objective: Objective = "time"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module`; returns whether anything was fused."""
        planner = context.planner_for(self.name)
        sequences = list(find_sequences(graph_module))
        ways = [self._ways(sequence, planner) for sequence in sequences]
        if self.objective == "memory":
            _keep_small(graph_module, sequences, ways, planner, context)
        count = 0
        for sequence, graph in zip(sequences, ways, strict=True):
            for begin, end in _cut(sequence, graph, context):
                name, piece = f"region_{count}_chain", sequence.piece(begin, end)
                times_us = _times_us(graph, begin, end)
                context.note(self.name, sequence.nodes[begin:end], f"one kernel, {name}", taken=True, times_us=times_us)
                region.merge(graph_module, piece, name, region.RegionInfo("chain"), self.name)
                count += 1
        return count > 0

    def _ways(self, sequence: RegionSequence, planner: Planner) -> nx.DiGraph[int]:
        """The ways through a sequence: from point to point between its regions, an edge for what may be one kernel."""
        ways: nx.DiGraph[int] = nx.DiGraph()
        links = sequence.links
        for begin, end in combinations(range(len(links) + 1), 2):
            if end - begin <= LONGEST[self.objective]:
                time_us = piece_time_us(links[begin:end], planner, self.objective)
                if time_us is not None:
                    ways.add_edge(begin, end, time_us=time_us)
        return ways


def _cut(sequence: RegionSequence, ways: nx.DiGraph[int], context: PassContext) -> list[tuple[int, int]]:
    """The pieces of several regions on the quickest of the `ways` through a sequence, as half-open ranges."""
    path = nx.shortest_path(ways, 0, len(sequence.nodes), weight="time_us")
    taken = [(begin, end) for begin, end in pairwise(path) if end - begin > 1]
    for begin, end in ways.edges:
        if end - begin > 1 and (begin, end) not in taken:
            times_us = _times_us(ways, begin, end)
            loses = times_us is not None and times_us[1] >= times_us[0]
            reason = f"not fused: {'no gain' if loses else 'other cuts of the sequence gain more'}"
            context.note(Fuse.name, sequence.nodes[begin:end], reason, times_us=times_us)
    return taken


def _times_us(ways: nx.DiGraph[int], begin: int, end: int) -> tuple[float, float] | None:
    """Predicted times of the regions from `begin` to `end` apart and as one; None where they cannot all be apart."""
    alone = [(index, index + 1) for index in range(begin, end)]
    if not all(ways.has_edge(*edge) for edge in alone):
        return None
    return sum(ways.edges[edge]["time_us"] for edge in alone), ways.edges[begin, end]["time_us"]


def _keep_small(
    graph_module: fx.GraphModule,
    sequences: Sequence[RegionSequence],
    ways: Sequence[nx.DiGraph[int]],
    planner: Planner,
    context: PassContext,
) -> None:
    """Remove from `ways` every piece that takes more memory than the graph has to take somewhere."""
    live = LiveBytes.of(graph_module)
    inside = {node for sequence in sequences for node in sequence.nodes}
    limit = max((live.during([node]) for node, _ in region.regions(graph_module) if node not in inside), default=0)
    for sequence, graph in zip(sequences, ways, strict=True):
        for begin, end in graph.edges:
            scratch = planner.chain_scratch_bytes([work_of(link) for link in sequence.links[begin:end]])
            peak = live.during(sequence.nodes[begin:end]) + scratch
            graph.edges[begin, end]["peak_bytes"] = peak
        limit = max(limit, _least_peak(graph, len(sequence.nodes)))
    for sequence, graph in zip(sequences, ways, strict=True):
        for begin, end in list(graph.edges):
            peak = graph.edges[begin, end]["peak_bytes"]
            if peak > limit:
                graph.remove_edge(begin, end)
                message = f"no kernel: takes {peak} bytes of memory, the limit is {limit}"
                context.note(Fuse.name, sequence.nodes[begin:end], message)


def _least_peak(ways: nx.DiGraph[int], end: int) -> int:
    """The least peak of any way from point 0 to `end`."""
    least = {0: 0}
    for point in range(1, end + 1):
        least[point] = min(
            max(least[begin], ways.edges[begin, point]["peak_bytes"]) for begin in ways.predecessors(point)
        )
    return least[end]
