"""Observers of the pass manager: the IR written into a directory, printed, or compared from pass to pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sepc.ir.printer import print_graph

if TYPE_CHECKING:
    from torch import fx

    from sepc.passes.manager import Pass

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

    def failed(self, one: Pass, error: Exception) -> None:
        """Called where pass `one` raised `error`, or left a graph that is not sound; the error is raised afterwards."""


@dataclass
class Dump(Observer):
    """Writes the IR into `directory`: ``000_input.py``, then one file for each pass that changed it.

    With `draw`, which writes a picture of a graph to a path, each has a picture beside it, a ``.dot`` file.
    """

    directory: Path
    draw: Callable[[fx.GraphModule, Path], object] | None = None

    def start(self, graph_module: fx.GraphModule) -> None:
        """Write the input."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write(graph_module, 0, "input")

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Write what the pass made of it."""
        if changed:
            self._write(graph_module, index, one.name)

    def _write(self, graph_module: fx.GraphModule, index: int, name: str) -> None:
        path = self.directory / f"{index:03d}_{name}.py"
        path.write_text(print_graph(graph_module))
        if self.draw is not None:
            self.draw(graph_module, path.with_suffix(".dot"))


@dataclass
class PrintIR(Observer):
    """Prints the IR before and after passes.

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
    _latest: str = field(default="", repr=False)

    def before(self, one: Pass, graph_module: fx.GraphModule) -> None:
        """Print, or keep for a failure."""
        if self.before_passes & {one.name, ALL}:
            self.write(f"# Before {one.name}\n{print_graph(graph_module)}")
        if self.on_failure:
            self._latest = print_graph(graph_module)

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Print, if asked to."""
        if self.after_passes & {one.name, ALL} and (changed or not self.changes_only):
            state = "" if changed else ", which changed nothing"
            self.write(f"# After {one.name}{state}\n{print_graph(graph_module)}")

    def failed(self, one: Pass, error: Exception) -> None:
        """Print what the pass failed on."""
        if self.on_failure:
            self.write(f"# Before {one.name}, which failed: {type(error).__name__}\n{self._latest}")


@dataclass
class PrintDifferences(Observer):
    """Prints what each pass changed in the IR, as a unified diff."""

    write: Write
    _latest: str = field(default="", repr=False)

    def start(self, graph_module: fx.GraphModule) -> None:
        """Keep the input."""
        self._latest = print_graph(graph_module)

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Print the difference, if there is one."""
        if not changed:
            return
        text, names = print_graph(graph_module), (f"before {one.name}", f"after {one.name}")
        difference = difflib.unified_diff(self._latest.splitlines(), text.splitlines(), *names, lineterm="")
        self.write("\n".join(difference) + "\n")
        self._latest = text
