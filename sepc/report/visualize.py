"""`sepc.visualize`: a picture of a model, a graph, or of what a compilation made of it, in a file."""

from __future__ import annotations

import logging
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import graphviz
from torch import fx, nn
from torch.export import ExportedProgram

from sepc.compiled import CompiledModel
from sepc.errors import InputError, SepcError, require_known
from sepc.report.dot import draw
from sepc.report.explanation import Explanation
from sepc.report.snapshot import Snapshot

if TYPE_CHECKING:
    Subject = nn.Module | ExportedProgram | fx.GraphModule | CompiledModel | Explanation

FORMATS: Final = ("svg", "png", "pdf", "dot")
INSTALL: Final = "install Graphviz (Debian: apt install graphviz)"
logger = logging.getLogger(__name__)


def visualize(
    subject: Subject,
    path: str | os.PathLike[str],
    *inputs: Any,
    before: fx.GraphModule | None = None,
    around: str | None = None,
    folds: bool | None = None,
) -> Path:
    """Draw a graph: its regions with kernel, tiling, bytes and predicted time, coloured by what that is spent on.

    Args:
        subject: a model, which is compiled for `inputs` on this host; a graph; what was compiled; or an explanation,
            whose measured times are shown if it has some (`Explanation.with_profile`).
        path: where to; the suffix is the format, ``.svg``, ``.png``, ``.pdf`` or ``.dot``.
        *inputs: the model's positional arguments.
        before: a graph to draw beside the graph `subject`, with what was removed and what is new marked.
        around: the name of a pass: the graphs before and after it are drawn, in this way.
        folds: whether stages that repeat are drawn once; None: only in large graphs.

    Returns the file written: with the suffix ``.dot``, and a warning of the logger ``sepc.report.visualize``, where no
    program `dot`, which is part of Graphviz. Raises InputError for another subject or suffix, and what
    `sepc.compile` raises.
    """
    path = Path(path)
    picture_format = path.suffix.removeprefix(".")
    if picture_format not in FORMATS:
        raise InputError(
            f"There is no format '{picture_format}'", where=str(path), fix=f"use one of {', '.join(FORMATS)}"
        )
    digraph = draw(*_sides(subject, inputs, before, around), folds=folds)
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture_format != "dot":
        try:
            path.write_bytes(render(digraph, picture_format))
        except GraphvizMissingError:
            logger.warning("Written as %s, since Graphviz is not installed: %s", path.with_suffix(".dot"), INSTALL)
        else:
            return path
    written = path.with_suffix(".dot")
    written.write_text(digraph.source, encoding="utf-8")
    return written


class GraphvizMissingError(SepcError):
    """There is no program `dot`."""


def render(digraph: graphviz.Digraph, picture_format: str) -> bytes:
    """A picture, drawn by Graphviz; raises GraphvizMissingError where it is not installed, SepcError where it fails."""
    try:
        return bytes(digraph.pipe(format=picture_format))
    except graphviz.ExecutableNotFound as error:
        raise GraphvizMissingError("Graphviz is not installed", why="there is no program `dot`", fix=INSTALL) from error
    except subprocess.CalledProcessError as error:
        why = str(error.stderr or error).partition("\n")[0]
        raise SepcError("Graphviz cannot draw the graph", why=why, fix="write it as .dot, and report it") from error


def _sides(
    subject: Subject, inputs: tuple[Any, ...], before: fx.GraphModule | None, around: str | None
) -> tuple[Snapshot, Snapshot | None]:
    """The graph to draw, and the one to draw beside it."""
    if isinstance(subject, fx.GraphModule) and not inputs:
        if around is not None:
            raise InputError(
                "A graph does not know its passes", where="around", fix="give a compiled model, or `before`"
            )
        return Snapshot.of(subject, "after"), None if before is None else Snapshot.of(before, "before")
    explanation = _explanation(subject, inputs)
    if before is not None:
        raise InputError("Only a graph has another one beside it", where="before", fix="give `around`, a pass's name")
    if around is None:
        return explanation.graph, None
    require_known(around, [one.name for one in explanation.passes], "pass")
    graphs = explanation.graphs
    index = next((index for index, one in enumerate(graphs) if one.title == around), None)
    if index is None:
        raise InputError(f"The pass '{around}' changed nothing", where="around", fix="choose one that did something")
    return replace(graphs[index], title=f"after {around}"), replace(graphs[index - 1], title=f"before {around}")


def _explanation(subject: Subject, inputs: tuple[Any, ...]) -> Explanation:
    from sepc._compile import explain

    match subject:
        case Explanation():
            return subject
        case CompiledModel():
            return subject.explain(*inputs)
        case nn.Module() | ExportedProgram() if inputs:
            return explain(subject, *inputs)
        case nn.Module() | ExportedProgram():
            raise InputError("There are no inputs to compile the model for", where="visualize", fix="give them")
        case _:
            raise InputError(f"There is no picture of {type(subject).__name__}", fix="give a model, or what sepc made")
