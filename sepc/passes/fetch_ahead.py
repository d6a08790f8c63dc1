"""fetch-ahead: have kernels that compute fetch the weights for which later kernels would wait.

Pattern. A region w that reads its weights, from behind the second-level cache, for longer than it computes with them: a
fully connected layer, or a convolution of few pixels. Regions c before it, convolutions in dense blocks, that compute
for longer than they read.

Equation. While c computes for t, memory could bring t · rate, and has to bring c's own weights only. So c can fetch

    idle(c) = t · rate − weights(c)

bytes of w's weights, which w then finds in the last cache. Of several regions the nearest to w fetches first in line;
those before it fetch what is left, from the end of what it leaves. Weights lie in the order of the regions, so what c
fetches is said by its distance from the end of c's own.

On a Zen 4 core, where other programs use the last cache too, MobileNetV2's classifier (5.1 MB) took 185 to 215 µs of
5800, and so takes 70, for 9 µs more in the layer before.

Preconditions. What is fetched fits into a part of the last cache. Results do not change: weights are only there sooner.
Where a region between c and w has constants of its own that are not known yet, as TVM lowers it, the wrong lines are
fetched, which only costs the gain.

    region_1_convolution, meta["sepc_tiling"] = Choice(blocks, cost)   (computes)
    region_2_linear                                                    (waits)
        →
    region_1_convolution, meta["sepc_tiling"] = Choice(blocks with ahead=Ahead(bytes, distance), cost)
    region_2_linear
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from torch import fx

from sepc.cost_model.ahead import packed_bytes, weight_bytes
from sepc.cost_model.planner import Planner
from sepc.cost_model.tiling import Ahead, DenseTiling, ProductTiling, Tiling
from sepc.ir import ops, region
from sepc.passes.choose_tiling import choice, region_problem
from sepc.passes.manager import PassContext
from sepc.passes.sequences import work_of

LEAST_PART_BYTES: Final = 128 << 10
"""Of what is shared out among kernels each gets so much, or the rest: every part takes an instruction in its loop."""
NO_WORK_KINDS = ("chain", "concatenation")
"""Kinds of regions of which none waits for weights, and none fetches ahead."""


@dataclass
class _Kernel:
    """A region in the order of the program.

    Attributes:
        node: it. weight_bytes: its packed weights, which come first. other_bytes: of its other constants.
        awaited_bytes: weights that it waits for, and nobody has fetched yet. idle_bytes: what it could still fetch.
    """

    node: fx.Node
    weight_bytes: int
    other_bytes: int
    awaited_bytes: int = 0
    idle_bytes: int = 0


@dataclass(frozen=True)
class FetchAhead:
    """Gives tilings something to fetch."""

    name: ClassVar[str] = "fetch-ahead"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Annotate the tilings of `graph_module`; it never counts as a change, as none of values."""
        planner = context.planner_for(self.name)
        kernels = list(_kernels(graph_module, planner))
        for index, kernel in enumerate(kernels):
            if kernel.awaited_bytes:
                self._fetch(kernels[: index + 1], planner.most_ahead_bytes, context)
        return False

    def _fetch(self, kernels: Sequence[_Kernel], most_bytes: int, context: PassContext) -> None:
        """Have kernels fetch what the last of them waits for, the nearest one first."""
        *before, waiting = kernels
        wanted, done, distance = min(waiting.awaited_bytes, most_bytes), 0, 0
        for kernel in reversed(before):
            fetched = min(wanted - done, kernel.idle_bytes)
            if fetched >= min(LEAST_PART_BYTES, wanted - done):
                self._annotate(kernel, waiting, Ahead(fetched, kernel.other_bytes + distance + done), context)
                kernel.idle_bytes -= fetched
                done += fetched
            if done >= wanted:
                return
            distance += kernel.weight_bytes + kernel.other_bytes

    def _annotate(self, kernel: _Kernel, waiting: _Kernel, ahead: Ahead, context: PassContext) -> None:
        found = choice(kernel.node)
        kernel.node.meta["sepc_tiling"] = replace(found, tiling=_fetching(found.tiling, ahead))
        message = f"{ahead} for {waiting.node.name}"
        context.note(self.name, [kernel.node, waiting.node], message, taken=True)


def _fetching(tiling: Tiling, ahead: Ahead) -> Tiling:
    if isinstance(tiling, ProductTiling):
        return replace(tiling, product=replace(tiling.product, ahead=(*tiling.product.ahead, ahead)))
    assert isinstance(tiling, DenseTiling), "nothing else has idle bytes"
    return replace(tiling, ahead=(*tiling.ahead, ahead))


def _kernels(graph_module: fx.GraphModule, planner: Planner) -> Iterator[_Kernel]:
    """The regions that have constants in the program, in order."""
    for node, graph in region.regions(graph_module):
        if region.info(node).kernel != "sepc":
            continue
        if region.info(node).kind in NO_WORK_KINDS:
            yield _Kernel(node, 0, _constant_bytes(graph))
            continue
        work, found = work_of(region_problem(node, graph)), choice(node)
        others = _constant_bytes(graph) - weight_bytes(work)
        awaited, idle = planner.awaited_bytes(work, found), planner.idle_bytes(work, found)
        yield _Kernel(node, packed_bytes(work, found.tiling), others, awaited, idle)


def _constant_bytes(graph: fx.GraphModule) -> int:
    tensors = (ops.constant(graph, node) for node in graph.graph.find_nodes(op="get_attr"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
