"""What became of a model, and why: its regions, who computes how much of it, and what every pass decided.

An `Explanation` is data. `str` makes text of it (`sepc.report.explanation_text`), `to_html` a page
(`sepc.report.explanation_html`), `to_dict` what JSON can hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sepc.ir import region
from sepc.ir.origin import origin_of
from sepc.report.flops import count_flops

if TYPE_CHECKING:
    from torch import fx

    from sepc._compile import Compiled
    from sepc.passes.manager import Note, PassRecord
    from sepc.runtime.gpu import Resources
    from sepc.runtime.report import RegionReport
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
class Explanation:
    """What became of a model for some arguments, and why; see `sepc.explain`.

    Attributes:
        model: its class. target: its name, with the core where the name does not say that.
        threads, optimize: what it was compiled for. arena_bytes: memory for intermediate values and scratch.
        regions: in execution order.
        passes: what each pass did, with its decisions.
    """

    model: str
    target: str
    threads: int
    optimize: str
    arena_bytes: int
    regions: tuple[RegionExplanation, ...]
    passes: tuple[PassRecord, ...]

    @staticmethod
    def of(model: str, compiled: Compiled, target: Target) -> Explanation:
        """The explanation of a specialisation, which may have come from the cache."""
        description, graph_module = compiled.description, compiled.lowered.graph_module
        found = {node.name: (node, graph) for node, graph in region.regions(graph_module)}
        return Explanation(
            model=model,
            target=target.text,
            threads=description.threads,
            optimize=description.optimize,
            arena_bytes=compiled.executable.program.arena_bytes,
            regions=tuple(_explain(one, *found[one.name]) for one in description.regions),
            passes=tuple(compiled.lowered.passes),
        )

    @property
    def total(self) -> Total:
        """The sums over all regions."""
        return Total.of(self.regions)

    @property
    def by_kernel(self) -> dict[str, Total]:
        """The sums over what each of "sepc", "tvm" and "torch" computes."""
        return {who: Total.of(one for one in self.regions if one.kernel == who) for who in WHO}

    @property
    def us_by_bottleneck(self) -> dict[str, float]:
        """Where the predicted time goes: microseconds of the regions by what bounds them, the longest first."""
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
        fields = asdict(self)
        for record in fields["passes"]:
            del record["notes"]
        fields["totals"] = {
            "all": asdict(self.total),
            "by_kernel": {who: asdict(total) for who, total in self.by_kernel.items()},
            "us_by_bottleneck": self.us_by_bottleneck,
        }
        fields["decisions"] = [{**asdict(note), "gain_us": note.gain_us} for note in self.decisions]
        plain: dict[str, Any] = json.loads(json.dumps(fields))
        return plain

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that shows all of it, in one file that needs no network; returns its path."""
        from sepc.report.explanation_html import page

        written = Path(path)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(page(self), encoding="utf-8")
        return written

    def __str__(self) -> str:
        from sepc.report.explanation_text import text

        return text(self)


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
