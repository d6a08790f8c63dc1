"""The dump of a compilation: the graph after every pass that changed it, as program and picture, and a page of all."""

from __future__ import annotations

import difflib
import hashlib
import re
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import jinja2
import torch
from torch import fx

from sepc.errors import InputError
from sepc.ir.script import script
from sepc.passes.observers import TextObserver
from sepc.report.dot import graph_to_dot
from sepc.report.visualize import GraphvizMissingError, render

if TYPE_CHECKING:
    from sepc.passes.manager import Pass, PassRecord

INDEX: Final = "index.html"
TRACEBACK: Final = "traceback.txt"
COMMAND: Final = "repeat.sh"
WEIGHTS: Final = "weights"
TEMPLATE: Final = "dump.html.jinja"
# What an earlier dump left in its directory.
_OWN = re.compile(rf"\d{{3}}_.*\.(py|dot|svg)|{re.escape(INDEX)}|{re.escape(TRACEBACK)}|{re.escape(COMMAND)}")


@dataclass
class Step:
    """A pass, or the input, which is step 0.

    Attributes:
        index, name: its place in the pipeline, and the pass.
        files: what was written; nothing if it changed nothing.
        difference: lines of a unified diff to the step before.
        record: what the pass did; None for the input.
    """

    index: int
    name: str
    files: tuple[str, ...] = ()
    difference: tuple[str, ...] = ()
    record: PassRecord | None = None


@dataclass
class Dump(TextObserver):
    """Writes into `directory` ``000_input.py``, then a file for each pass that changed something, each with a picture.

    Pictures are ``.dot`` files, and ``.svg`` ones where there is Graphviz. The programs build the graphs, with the
    weights that are beside them, of which each is there once. After every pass the page ``index.html`` tells of all of
    them, so that nothing is lost whatever becomes of the next one.

    Attributes:
        directory: made if need be; what an earlier dump has left there goes.
        failed_pass: the pass that raised an error, whose traceback is then there, too.
    """

    directory: Path
    failed_pass: Pass | None = None
    _steps: list[Step] = field(default_factory=list, init=False, repr=False)
    _traceback: str = field(default="", init=False, repr=False)

    def start(self, graph_module: fx.GraphModule) -> None:
        """Write the input."""
        super().start(graph_module)
        try:
            (self.directory / WEIGHTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where, why = str(self.directory), error.strerror or str(error)
            raise InputError(
                "The dump cannot be written", where=where, why=why, fix="give another directory"
            ) from error
        for path in self.directory.iterdir():
            if _OWN.fullmatch(path.name):
                path.unlink()
        for path in (self.directory / WEIGHTS).glob("*.pt"):
            path.unlink()
        self._steps, self.failed_pass, self._traceback = [Step(0, "input")], None, ""
        self._steps[0].files = tuple(self._write(graph_module, "000_input", "The graph as captured"))
        self.write_index()

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Write what the pass made of it."""
        step, (before, now) = Step(index, one.name), self.compare(graph_module)
        if difference := list(difflib.unified_diff(before, now, n=2, lineterm="")):
            step.difference = tuple(difference[2:])  # Without the names of the files.
            step.files = tuple(self._write(graph_module, f"{index:03d}_{one.name}", f"After {one.name}"))
        self._steps.append(step)

    def recorded(self, record: PassRecord) -> None:
        """Note how long the pass took, and why it did what it did."""
        self._steps[-1].record = record
        self.write_index()

    def failed(self, one: Pass, error: Exception) -> None:
        """Keep the traceback; the graph before the pass is that of the last step with files."""
        self.failed_pass = one
        self._traceback = "".join(traceback.format_exception(error))
        (self.directory / TRACEBACK).write_text(self._traceback, encoding="utf-8")
        self.write_index()

    @property
    def latest(self) -> str:
        """The program of the graph as it was after the last pass that changed something."""
        return next(step.files[0] for step in reversed(self._steps) if step.files)

    def write_index(self) -> None:
        """Write the page."""
        loader = jinja2.PackageLoader("sepc", "report")
        environment = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        command = self.directory / COMMAND
        page = environment.get_template(TEMPLATE).render(
            steps=self._steps,
            total_ms=sum(step.record.time_ms for step in self._steps if step.record is not None),
            failed=self.failed_pass.name if self.failed_pass is not None else "",
            latest=self.latest,
            traceback=self._traceback,
            command=command.read_text(encoding="utf-8").splitlines()[-1] if command.exists() else "",
        )
        (self.directory / INDEX).write_text(page, encoding="utf-8")

    def _write(self, graph_module: fx.GraphModule, stem: str, title: str) -> Iterator[str]:
        """Write a graph; gives the names of the files."""
        files = {".py": script(graph_module, title, self._constant)}
        digraph = graph_to_dot(graph_module)
        files[".dot"] = digraph.source
        with suppress(GraphvizMissingError):  # Else there is the source, for another machine.
            files[".svg"] = render(digraph, "svg").decode()
        for suffix, text in files.items():
            (self.directory / f"{stem}{suffix}").write_text(text, encoding="utf-8")
            yield f"{stem}{suffix}"

    def _constant(self, value: torch.Tensor) -> str:
        """Write a constant, unless it is there; gives the expression that reads it."""
        # By content, as passes hand most of the weights on as they are.
        plain = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        kind = f"{value.dtype} {list(value.shape)} {list(value.stride())} "
        name = f"{hashlib.sha256(kind.encode() + plain.tobytes()).hexdigest()[:16]}.pt"
        path = self.directory / WEIGHTS / name
        if not path.exists():
            torch.save(value.detach().clone(), path)  # A view would bring the whole of its memory along.
        return f'torch.load(here / "{WEIGHTS}/{name}")'
