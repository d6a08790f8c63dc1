"""The pipeline: which passes run, in which order, and why there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sepc.passes.canonicalize import Canonicalize
from sepc.passes.choose_tiling import ChooseTiling
from sepc.passes.demote import Demote
from sepc.passes.fetch_ahead import FetchAhead
from sepc.passes.fold_batch_norm import FoldBatchNorm
from sepc.passes.fuse import Fuse
from sepc.passes.gather_means import GatherMeans
from sepc.passes.group import Group
from sepc.passes.merge_branches import MergeBranches
from sepc.passes.merge_pointwise import MergePointwise
from sepc.passes.place_concatenations import PlaceConcatenations
from sepc.passes.plan_layout import PlanLayout
from sepc.passes.plan_memory import PlanMemory
from sepc.passes.promote import Promote
from sepc.passes.recompute import Recompute
from sepc.passes.separate_conv import SeparateConv

if TYPE_CHECKING:
    from sepc.cost_model.chain import Objective
    from sepc.passes.manager import Pass

PIPELINE: tuple[Pass, ...] = (
    # First, so that every later pass sees float32 where the model has halves; before constants are folded in those.
    Promote(),
    # So that every later pass has to know one spelling of each operation only.
    Canonicalize(),
    # Reads normalisations inside of branches itself, and comes before they are folded, so that one behind the sum is
    # folded into what the branches became.
    MergeBranches(),
    # Before grouping: a normalisation folded into weights is one that no kernel has to compute.
    FoldBatchNorm(),
    # Needs normalisations between convolutions folded; before grouping, as a convolution less is a region less.
    MergePointwise(),
    # Needs normalisations folded, and what merges merged; before grouping, as it makes several convolutions of one.
    SeparateConv(),
    # After all that computes with weights, which is done in float32; before grouping, so that conversions join regions.
    Demote(),
    # From here on a node is a kernel. Whatever rewrites single operations has to come before.
    Group(),
    # Needs the regions. Before fuse, which makes chains of the copies.
    Recompute(),
    # Needs the regions. Before layouts are planned, as values inside a region have none.
    Fuse(),
    # Needs the chains: what ends in one can gather means, but what has two results could not be in the middle of one.
    GatherMeans(),
    # Needs the regions: what a region reads and writes decides the layouts, and copies become regions of their own.
    PlanLayout(),
    # Needs the layouts, and has to come before anything looks at the strides of a single kernel.
    PlaceConcatenations(),
    # Needs the layouts: which loops can be merged depends on strides.
    ChooseTiling(),
    # Needs the tilings and their predicted costs.
    FetchAhead(),
    # Last, as it needs to know every storage there will be.
    PlanMemory(),
)


SPELLING: tuple[Pass, ...] = PIPELINE[:2]
"""What has to have run before any other pass can."""


def pipeline(objective: Objective) -> tuple[Pass, ...]:
    """`PIPELINE`, with what has a choice between time and memory deciding for `objective`."""
    return tuple(replace(one, objective=objective) if isinstance(one, Fuse | ChooseTiling) else one for one in PIPELINE)


PASSES: dict[str, type[Pass]] = {
    "promote": Promote,
    "canonicalize": Canonicalize,
    "merge-branches": MergeBranches,
    "fold-batch-norm": FoldBatchNorm,
    "merge-pointwise": MergePointwise,
    "separate-conv": SeparateConv,
    "demote": Demote,
    "group": Group,
    "recompute": Recompute,
    "fuse": Fuse,
    "gather-means": GatherMeans,
    "plan-layout": PlanLayout,
    "place-concatenations": PlaceConcatenations,
    "choose-tiling": ChooseTiling,
    "fetch-ahead": FetchAhead,
    "plan-memory": PlanMemory,
}
