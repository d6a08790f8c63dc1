"""Observers of the pass manager: the IR printed, or compared from pass to pass; `sepc.report.dump` writes files."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sepc.ir.printer import print_graph
from sepc.ir.script import script

if TYPE_CHECKING:
    from torch import fx

    from sepc.passes.manager import Pass, PassRecord

Write = Callable[[str], object]
ALL = "*"
"""In place of a pass's name: every pass."""


class Observer:
    """Somebody who looks on while passes run; what is here does nothing."""

    def start(self, graph_module: fx.GraphModule) -> None:
        """Called with the graph as it is before the first pass."""

    def before(self, one: Pass, graph_module: fx.GraphModule) -> None:
        """Called before pass `one` runs."""

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Called after pass `one`, number `index` counted from 1, has run and its result was found sound."""

    def recorded(self, record: PassRecord) -> None:
        """Called after `after`, with what the pass did."""

    def failed(self, one: Pass, error: Exception) -> None:
        """Called where pass `one` raised `error`, or left a graph that is not sound; the error is raised afterwards."""


@dataclass
class TextObserver(Observer):
    """Compares the printed IR: some passes change no node, but say how regions are computed."""

    _latest: str = field(default="", init=False, repr=False)

    def start(self, graph_module: fx.GraphModule) -> None:
        """Keep the input."""
        self._latest = print_graph(graph_module)

    def compare(self, graph_module: fx.GraphModule) -> tuple[list[str], list[str]]:
        """The lines of the IR as it was at the last look, and as it is."""
        before, self._latest = self._latest, print_graph(graph_module)
        return before.splitlines(), self._latest.splitlines()


@dataclass
class PrintIR(TextObserver):
    """Prints the IR before and after passes, each time as a program of its own.

    Attributes:
        write: called with the text. before, after: names of passes, or `ALL`.
        changes_only: print after passes only where they changed something.
        on_failure: where a pass fails, print the IR before it.
    """

    write: Write
    before_passes: frozenset[str] = frozenset()
    after_passes: frozenset[str] = frozenset()
    changes_only: bool = False
    on_failure: bool = False
    _before: str = field(default="", init=False, repr=False)

    def before(self, one: Pass, graph_module: fx.GraphModule) -> None:
        """Print, or keep for a failure."""
        if self.before_passes & {one.name, ALL}:
            self.write(script(graph_module, f"Before {one.name}"))
        if self.on_failure:
            self._before = script(graph_module, f"Before {one.name}, which failed")

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Print, if asked to."""
        before, now = self.compare(graph_module)
        if self.after_passes & {one.name, ALL} and (before != now or not self.changes_only):
            state = "" if before != now else ", which changed nothing"
            self.write(script(graph_module, f"After {one.name}{state}"))

    def failed(self, one: Pass, error: Exception) -> None:
        """Print what the pass failed on."""
        if self.on_failure:
            self.write(self._before)


@dataclass
class PrintDifferences(TextObserver):
    """Prints what each pass changed in the IR, as a unified diff."""

    write: Write

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Print the difference, if there is one."""
        before, now = self.compare(graph_module)
        names = f"before {one.name}", f"after {one.name}"
        if difference := list(difflib.unified_diff(before, now, *names, lineterm="")):
            self.write("\n".join(difference) + "\n")
