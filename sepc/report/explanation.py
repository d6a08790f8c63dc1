"""What became of a model, and why: its regions, who computes how much of it, and what every pass decided.

An `Explanation` is data. `str` makes text of it (`sepc.report.explanation_text`), `to_html` a page
(`sepc.report.page`), `plot` a picture of costs (`sepc.report.plots`), `to_dict` what JSON can hold.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sepc.cost_model.roofline import Roofline
from sepc.errors import InputError
from sepc.ir import region
from sepc.ir.origin import origin_of
from sepc.passes.plan_memory import storage_bytes
from sepc.report.flops import count_flops
from sepc.report.history import Evidence

if TYPE_CHECKING:
    from torch import fx

    from sepc._compile import Compiled
    from sepc.compiled import SourceForm
    from sepc.passes.manager import Note, PassRecord
    from sepc.passes.plan_memory import MemoryPlan
    from sepc.report.plots import PlotKind
    from sepc.report.snapshot import Snapshot
    from sepc.runtime.gpu import Resources
    from sepc.runtime.report import Profile, RegionReport
    from sepc.target import Target

WHO: Final[Mapping[str, str]] = {"sepc": "sepc", "tvm": "TVM", "torch": "PyTorch"}
"""Who computes a region, in words."""


@dataclass(frozen=True)
class RegionExplanation:
    """A region: one kernel, or what PyTorch runs between two.

    Attributes:
        name, kind, ops, kernel, reason, tiling, predicted_us, bottleneck, bytes_moved, resources: as in `RegionReport`.
        sources: the user's lines that it comes from, as ``file:line``.
        flops: floating-point operations of its convolutions and matrix products, whoever computes them.
        compute_us: predicted time if only arithmetic counted.
        bytes_per_level: predicted bytes that come from, or go to, each memory level behind the first.
        measured_us: as a profile measured it; None without one.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    kernel: str
    reason: str
    sources: tuple[str, ...]
    tiling: str
    predicted_us: float
    bottleneck: str
    bytes_moved: int
    flops: int
    compute_us: float
    bytes_per_level: dict[str, float]
    measured_us: float | None = None
    resources: tuple[Resources, ...] = ()


@dataclass(frozen=True)
class Total:
    """The sums over some regions; `predicted_us` is of those that have a prediction."""

    regions: int
    flops: int
    bytes_moved: int
    predicted_us: float

    @staticmethod
    def of(regions: Iterable[RegionExplanation]) -> Total:
        """The sums over `regions`."""
        every = list(regions)
        return Total(
            len(every),
            sum(one.flops for one in every),
            sum(one.bytes_moved for one in every),
            sum(one.predicted_us for one in every),
        )


@dataclass(frozen=True)
class Storage:
    """A place in the arena: its bytes, and the numbers of the first and the last region that use it.

    `name` is that of the node which writes it, or of the region whose scratch it is.
    """

    name: str
    offset_bytes: int
    size_bytes: int
    first: int
    last: int
    is_scratch: bool = False


@dataclass(frozen=True)
class Explanation:
    """What became of a model for some arguments, and why; see `sepc.explain`.

    Attributes:
        model: its class. target: its name, with the core where the name does not say that.
        threads, optimize: what it was compiled for. arena_bytes: memory for intermediate values and scratch.
        roofline: what the target does at the most, with so many threads.
        regions: in execution order.
        storages: the arena's. unshared_bytes: what they would take if none were used again.
        passes: what each pass did, with its decisions.
        evidence: what is looked up when asked: graphs, and sources of kernels.
    """

    model: str
    target: str
    threads: int
    optimize: str
    arena_bytes: int
    roofline: Roofline
    regions: tuple[RegionExplanation, ...]
    storages: tuple[Storage, ...]
    unshared_bytes: int
    passes: tuple[PassRecord, ...]
    evidence: Evidence = field(repr=False, compare=False)

    @staticmethod
    def of(model: str, compiled: Compiled, target: Target) -> Explanation:
        """The explanation of a specialisation, which may have come from the cache."""
        description, graph_module = compiled.description, compiled.lowered.graph_module
        found = {node.name: (node, graph) for node, graph in region.regions(graph_module)}
        plan: MemoryPlan = graph_module.meta["sepc_memory"]
        return Explanation(
            model=model,
            target=target.text,
            threads=description.threads,
            optimize=description.optimize,
            arena_bytes=compiled.executable.program.arena_bytes,
            roofline=Roofline.of(target.machine, description.threads, target.element),
            regions=tuple(_explain(one, *found[one.name]) for one in description.regions),
            storages=_storages(graph_module, plan, compiled.lowered.scratch),
            unshared_bytes=plan.unshared_bytes,
            passes=tuple(compiled.lowered.passes),
            evidence=Evidence(compiled, target),
        )

    def with_profile(self, profile: Profile) -> Explanation:
        """The same with measured times, from `CompiledModel.profile`; raises InputError for another model's."""
        measured_us = {one.name: one.measured_us for one in profile}
        if measured_us.keys() != {one.name for one in self.regions}:
            why = "its regions are others"
            raise InputError("The profile is not of this model", why=why, fix="profile it for the same arguments")
        regions = tuple(replace(one, measured_us=measured_us[one.name]) for one in self.regions)
        return replace(self, regions=regions)

    @property
    def graph(self) -> Snapshot:
        """The graph after all passes, with what is known of its regions."""
        return self.evidence.graph.with_figures(self.regions)

    @property
    def graphs(self) -> tuple[Snapshot, ...]:
        """The graph as captured, and after each pass that changed it or found something out about it, by its title."""
        return tuple(step.snapshot for step in self.evidence.history)

    def source(self, region: str, form: SourceForm = "tirx") -> str:
        """The code of a region's kernels as "tirx", "llvm" or "asm"; raises SepcError for a region without any."""
        return self.evidence.source(region, form)

    def has_source(self, region: str) -> bool:
        """Whether a region has kernels; PyTorch runs the others."""
        return bool(self.evidence.symbols(region))

    @property
    def total(self) -> Total:
        """The sums over all regions."""
        return Total.of(self.regions)

    @property
    def measured_us(self) -> float | None:
        """The sum of the measured times; None without a profile."""
        times_us = [one.measured_us for one in self.regions if one.measured_us is not None]
        return sum(times_us) if times_us else None

    @property
    def by_kernel(self) -> dict[str, Total]:
        """The sums over what each of "sepc", "tvm" and "torch" computes."""
        return {who: Total.of(one for one in self.regions if one.kernel == who) for who in WHO}

    @property
    def us_by_bottleneck(self) -> dict[str, float]:
        """Where the predicted time goes, as microseconds of the regions by what bounds them, the longest first."""
        times: dict[str, float] = {}
        for one in self.regions:
            if one.bottleneck:
                times[one.bottleneck] = times.get(one.bottleneck, 0.0) + one.predicted_us
        return dict(sorted(times.items(), key=lambda item: -item[1]))

    @property
    def decisions(self) -> tuple[Note, ...]:
        """What the passes did, and what they did not, in order."""
        return tuple(note for record in self.passes for note in record.notes)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, which JSON can hold and gives back as they are."""
        values: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "evidence"}
        values["totals"] = {
            "all": asdict(self.total),
            "by_kernel": {who: asdict(total) for who, total in self.by_kernel.items()},
            "us_by_bottleneck": self.us_by_bottleneck,
        }
        values["decisions"] = [{**asdict(note), "gain_us": note.gain_us} for note in self.decisions]
        plain: dict[str, Any] = json.loads(json.dumps(values, default=asdict))
        for record in plain["passes"]:
            del record["notes"]
        return plain

    def plot(self, path: str | os.PathLike[str], kind: PlotKind) -> Path:
        """Write a picture of costs; its suffix, ``.svg``, ``.png`` or ``.pdf``, is its format. Returns its path.

        Args:
            path: where to.
            kind: "efficiency-gap" shows each region's time against the least its operations could take; "waterline"
                the operations per byte of kernel after kernel, and how many the machine needs; "memory" what lies
                where in the arena while each kernel runs.

        Raises InputError for another kind or suffix, SepcError where matplotlib is not installed.
        """
        from sepc.report.plots import plot

        return plot(self, Path(path), kind)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that shows all of it, in one file that needs no network; returns its path.

        Graphs are laid out by Graphviz, and costs drawn by matplotlib; the page says so where either is not installed.
        """
        from sepc.report.page import page

        written = Path(path)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(page(self), encoding="utf-8")
        return written

    def __str__(self) -> str:
        from sepc.report.explanation_text import text

        return text(self)


def _storages(
    graph_module: fx.GraphModule, plan: MemoryPlan, scratch: Mapping[str, tuple[int, int]]
) -> tuple[Storage, ...]:
    """What lies in the arena, from which region to which: values, then scratch."""
    starts = [index for index, node in enumerate(graph_module.graph.nodes) if region.is_region(node)]
    numbers = {node.name: index for index, (node, _) in enumerate(region.regions(graph_module))}

    def number(position: int) -> int:
        return max(0, bisect_right(starts, position) - 1)

    values = [
        Storage(node.name, plan.arena_offsets[node], storage_bytes(node), number(first), number(last))
        for node, (first, last) in plan.lifetimes.items()
    ]
    scratches = [
        Storage(name, offset, size, numbers[name], numbers[name], is_scratch=True)
        for name, (offset, size) in scratch.items()
    ]
    return (*values, *scratches)


def _explain(report: RegionReport, node: fx.Node, graph: fx.GraphModule) -> RegionExplanation:
    lines = [origin_of(inner).source for inner in region.computations(graph)]
    sources = [line for line in lines if line] or [line for line in (origin_of(node).source,) if line]
    choice = node.meta.get("sepc_tiling")
    cost = choice.cost if choice is not None and report.kernel == "sepc" else None
    return RegionExplanation(
        name=report.name,
        kind=report.kind,
        ops=report.ops,
        kernel=report.kernel,
        reason=report.reason,
        sources=tuple(dict.fromkeys(sources)),
        resources=report.resources,
        tiling=report.tiling,
        predicted_us=report.predicted_us,
        bottleneck=report.bottleneck,
        bytes_moved=report.bytes_moved,
        flops=count_flops(graph),
        compute_us=cost.compute_us if cost else 0.0,
        bytes_per_level=dict(cost.bytes_per_level) if cost else {},
    )
