"""What ``sepc-opt --emit`` writes: one table, with an entry for each form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sepc.errors import InputError

if TYPE_CHECKING:
    from sepc.cli.models import Given
    from sepc.compiled import CompiledModel, SourceForm
    from sepc.frontend.export import Captured

Subject = Literal["graph", "compiled"]


@dataclass(frozen=True)
class Form:
    """A form of the result.

    Attributes:
        of: what it is made of: the graph after the passes that were asked for, as a `Captured`, or a `CompiledModel`.
        write: writes it, to a file, or to standard output where there is none, for the model that was given.
        needs_file: whether standard output will not do.
    """

    of: Subject
    write: Callable[[Any, Given, Path | None], None]
    needs_file: bool = False

    def require_file(self, name: str, output: Path | None) -> None:
        """Nothing, if it can be written to `output`; raises InputError."""
        if self.needs_file and output is None:
            raise InputError(f"A {name} needs a file", where=f"--emit={name}", fix="give it with -o FILE")


def write(text: str, output: Path | None) -> None:
    """Write a text to a file, whose directory is made if need be, or to standard output."""
    if output is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    _with_directory(output).write_text(text, encoding="utf-8")


def _with_directory(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _ir(captured: Captured, _: Given, output: Path | None) -> None:
    from sepc.ir.script import script

    write(script(captured.graph_module, "The graph"), output)


def _dot(captured: Captured, _: Given, output: Path | None) -> None:
    from sepc.report.dot import graph_to_dot

    write(graph_to_dot(captured.graph_module).source, output)


def _svg(captured: Captured, _: Given, output: Path | None) -> None:
    from sepc.report.dot import graph_to_dot
    from sepc.report.visualize import render

    write(render(graph_to_dot(captured.graph_module), "svg").decode(), output)


def _pt2(captured: Captured, given: Given, output: Path | None) -> None:
    import torch

    from sepc.frontend.program import as_program

    assert output is not None
    torch.export.save(as_program(captured, given.inputs, given.kwargs), _with_directory(output))


def _kernels(form: SourceForm, comment: str) -> Callable[[CompiledModel, Given, Path | None], None]:
    """Writes the sources of all kernels, with the name of each region as a comment in front."""

    def write_sources(compiled: CompiledModel, _: Given, output: Path | None) -> None:
        regions = [one.name for one in compiled.regions if one.symbols]
        write("\n".join(f"{comment} {name}\n{compiled.source(name, form)}" for name in regions), output)

    return write_sources


def _report(compiled: CompiledModel, given: Given, output: Path | None) -> None:
    assert output is not None
    compiled.explain(*given.inputs, **given.kwargs).to_html(output)


FORMS: Final[Mapping[str, Form]] = {
    "ir": Form("graph", _ir),
    "dot": Form("graph", _dot),
    "svg": Form("graph", _svg),
    "pt2": Form("graph", _pt2, needs_file=True),
    "tirx": Form("compiled", _kernels("tirx", "#")),
    "llvm": Form("compiled", _kernels("llvm", ";")),
    "asm": Form("compiled", _kernels("asm", "#")),
    "cuda": Form("compiled", _kernels("cuda", "//")),
    "opencl": Form("compiled", _kernels("opencl", "//")),
    "report": Form("compiled", _report, needs_file=True),
}
