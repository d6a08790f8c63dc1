"""The graph as it was after each pass, kept while passes run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from sepc.errors import SepcError
from sepc.ir.printer import print_graph
from sepc.passes.observers import Observer
from sepc.report.snapshot import Snapshot

if TYPE_CHECKING:
    from torch import fx

    from sepc._compile import Compiled
    from sepc.passes.manager import Pass
    from sepc.target import Target

INPUT = "input"
"""Title of the graph before the first pass."""


@dataclass(frozen=True)
class Step:
    """A graph, and the same printed."""

    snapshot: Snapshot
    text: str


@dataclass
class History(Observer):
    """Keeps the graph before the first pass, and after each one that left another graph, or knew more about it."""

    steps: list[Step] = field(default_factory=list)

    def start(self, graph_module: fx.GraphModule) -> None:
        """Keep the input."""
        self.steps = [Step(Snapshot.of(graph_module, INPUT), print_graph(graph_module))]

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Keep what the pass made of it. Some passes change no node, but say how regions are computed."""
        text = print_graph(graph_module)
        if text != self.steps[-1].text:
            self.steps.append(Step(Snapshot.of(graph_module, one.name), text))


@dataclass(frozen=True)
class Evidence:
    """What an explanation looks up only when it is asked: it is large, or takes seconds to find out."""

    compiled: Compiled
    target: Target

    @cached_property
    def history(self) -> tuple[Step, ...]:
        """The graph after each pass; all passes run again for this."""
        history = History()
        self.compiled.run_passes([history])
        return tuple(history.steps)

    @property
    def graph(self) -> Snapshot:
        """The graph after all passes."""
        return Snapshot.of(self.compiled.lowered.graph_module)

    def symbols(self, region: str) -> tuple[str, ...]:
        """The kernels of a region; of one that PyTorch runs none."""
        return self.compiled.executable.program.symbols.get(region, ())

    def source(self, region: str, form: str) -> str:
        """The code of a region's kernels, of which there must be some; raises SepcError."""
        symbols = self.symbols(region)
        if not symbols:
            raise SepcError(f"There is no kernel for region '{region}'", fix="choose one that sepc or TVM computes")
        return "\n".join(self.compiled.lowered.source(symbol, form, self.target) for symbol in symbols)
