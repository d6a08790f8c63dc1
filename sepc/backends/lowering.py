"""How the regions of a graph become kernels: for CPUs here, for GPUs in `sepc.backends.gpu.lowering`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from sepc.backends import generic
from sepc.backends.regions import LoweredKernel, lower, lower_chain, lower_concatenation
from sepc.cost_model.tiling import ChainTiling, RowTiling
from sepc.errors import VerificationError
from sepc.ir import region
from sepc.ir.layout import layout
from sepc.ir.problem import Strides
from sepc.passes.choose_tiling import chain_problems, choice, region_problem


class Lowering(Protocol):
    """What the kernels of a graph's regions are made by."""

    def kernels(self, node: fx.Node, graph: fx.GraphModule) -> list[LoweredKernel]:
        """The kernels of ours of a region, in order; none where nothing is left to do."""

    def generic(self, graph: fx.GraphModule, name: str) -> generic.GenericRegion | generic.Rejection:
        """The kernels that TVM makes of a region; `name` begins their symbols."""


@dataclass(frozen=True)
class CpuLowering:
    """Kernels for vectors of `lanes` float32."""

    lanes: int

    def kernels(self, node: fx.Node, graph: fx.GraphModule) -> list[LoweredKernel]:
        """See `Lowering`."""
        tiling = choice(node).tiling
        if region.info(node).kind == "chain" and isinstance(tiling, ChainTiling):
            return [lower_chain(graph, chain_problems(node, graph), tiling, self.lanes)]
        if region.info(node).kind != "concatenation":
            return lower(graph, region_problem(node, graph), tiling, self.lanes)
        if (given := copied(node, graph)) is None:
            return []
        return [lower_concatenation(graph, given, layout(node).strides, row_tiling(node), self.lanes)]

    def generic(self, graph: fx.GraphModule, name: str) -> generic.GenericRegion | generic.Rejection:
        """See `Lowering`."""
        return generic.lower(graph, name, self.lanes)


def copied(node: fx.Node, graph: fx.GraphModule) -> Sequence[Strides | None] | None:
    """Strides of the inputs of a concatenation, None for those that are in their places; None where all are."""
    given = [None if layout(value).base is node else layout(value).strides for value in region.inputs(node)]
    constants = len(given) < len(region.computations(graph)[0].all_input_nodes)
    return given if constants or any(given) else None


def row_tiling(node: fx.Node) -> RowTiling:
    """The tiling of a concatenation."""
    tiling = choice(node).tiling
    if not isinstance(tiling, RowTiling):
        raise VerificationError("A tiling does not fit a concatenation", where=node.name, why=str(tiling))
    return tiling
