"""Graphs as Graphviz draws them: regions are boxes around their operators, coloured by what bounds them.

Two graphs are drawn side by side, with what is removed marked in the first, and what is new in the second. Of what
repeats one is drawn, with how often it comes (`sepc.report.folding`). Operators link to the user's source lines.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePath
from typing import Final

import graphviz
from torch import fx

from sepc.report.folding import LEAST_NODES, Repeat, fold, shorten
from sepc.report.palette import COLOURS, MARKS, OTHER, colour_of
from sepc.report.snapshot import DrawnNode, DrawnRegion, Mark, Snapshot, compare
from sepc.report.words import bytes_text, flops_text, short_source, time_text

_FONT: Final = "Helvetica"
_GREY: Final = "#666666"
_WIDTH: Final = 56  # characters


def graph_to_dot(graph_module: fx.GraphModule) -> graphviz.Digraph:
    """Draw a graph at any stage of compilation."""
    return draw(Snapshot.of(graph_module))


def draw(after: Snapshot, before: Snapshot | None = None, *, folds: bool | None = None) -> graphviz.Digraph:
    """Draw a graph.

    Args:
        after: the graph.
        before: drawn beside it, with the differences marked.
        folds: whether what repeats is drawn once; None: in graphs of `LEAST_NODES` nodes and more.
    """
    digraph: graphviz.Digraph = graphviz.Digraph("sepc")
    digraph.attr(rankdir="TB", nodesep="0.2", ranksep="0.25", fontname=_FONT, fontsize="10", labelloc="t")
    digraph.attr("node", fontname=_FONT, fontsize="10", shape="box", style="filled,rounded", fillcolor="#FFFFFF")
    digraph.attr("node", color=_GREY, height="0.3", margin="0.08,0.04")
    digraph.attr("edge", color=_GREY, arrowsize="0.6")
    sides = (after,) if before is None else (before, after)
    marks: tuple[Mapping[str, Mark], ...] = ({},) if before is None else compare(before, after)
    for index, (side, own_marks) in enumerate(zip(sides, marks, strict=True)):
        size = len(side.nodes)
        folded, repeats = fold(side) if (size >= LEAST_NODES if folds is None else folds) else (side, ())
        drawer = _Drawer(shorten(folded), own_marks, repeats, f"{index}/" if before is not None else "")
        if before is None:
            drawer.draw(digraph)
        else:
            with digraph.subgraph(name=f"cluster_side_{index}") as half:
                half.attr(label=side.title or ("before", "after")[index], style="dashed", color=_GREY, fontsize="14")
                drawer.draw(half)
    digraph.attr(
        label=_legend(
            [one for side in sides for one in side.regions.values()], [*marks[0].values(), *marks[-1].values()]
        )
    )
    return digraph


class _Drawer:
    """Draws one graph, with a prefix before the names of its nodes."""

    def __init__(self, snapshot: Snapshot, marks: Mapping[str, Mark], repeats: Sequence[Repeat], prefix: str) -> None:
        self.snapshot, self.marks, self.prefix = snapshot, marks, prefix
        self.repeats = {key: repeat for repeat in repeats for key in repeat.members}

    def draw(self, digraph: graphviz.Digraph) -> None:
        """Nodes with the boxes around them, then edges."""
        for repeat, members in groupby(self.snapshot.nodes, key=lambda node: self.repeats.get(node.key)):
            if repeat is None:
                self._draw_units(digraph, members)
                continue
            with digraph.subgraph(name=f"cluster_{self.prefix}{repeat.members[0]}_repeated") as box:
                time = f", {time_text(repeat.predicted_us)} in all" if repeat.predicted_us else ""
                box.attr(label=_lines([f"× {repeat.times}{time}"]), labeljust="r", style="dashed", color=_GREY)
                box.attr(bgcolor="#F4F4F4", fontname=f"{_FONT}-Bold", fontsize="12")
                self._draw_units(box, members)
        for node in self.snapshot.nodes:
            for key in node.inputs:
                digraph.edge(f"{self.prefix}{key}", f"{self.prefix}{node.key}")

    def _draw_units(self, digraph: graphviz.Digraph, nodes: Iterable[DrawnNode]) -> None:
        for name, members in groupby(nodes, key=lambda node: node.region):
            if not name:
                for node in members:
                    self._draw_node(digraph, node)
                continue
            with digraph.subgraph(name=f"cluster_{self.prefix}{name}") as box:
                self._dress(box, self.snapshot.regions[name])
                for node in members:
                    self._draw_node(box, node)

    def _dress(self, box: graphviz.Digraph, region: DrawnRegion) -> None:
        mark, colour = self.marks.get(region.name), colour_of(region.colour)
        box.attr(label=_lines(region_lines(region), "l"), labeljust="l", style="filled,rounded", fontsize="9")
        box.attr(fontname=_FONT, fillcolor=colour.tint, tooltip=_escape(f"{region.name}: {colour.words}"))
        box.attr(color=MARKS[mark].strong if mark else colour.strong, penwidth="3" if mark else "1")

    def _draw_node(self, digraph: graphviz.Digraph, node: DrawnNode) -> None:
        options = dict(_LOOKS.get(node.role, {}))
        mark = self.marks.get(node.key)
        if mark:
            options |= {"color": MARKS[mark].strong, "penwidth": "2.5", "shape": "box"}
            options["style"] = "filled,rounded,dashed" if mark == "removed" else "filled,rounded"
        if node.source:
            options |= {"URL": link(node.source), "target": "_blank"}
        made = f", by {node.made_by}" if node.made_by not in ("", "frontend") else ""
        source = short_source(node.source) if node.source else "no source"
        far = f"; reads {', '.join(node.far)} as well" if node.far else ""
        options["tooltip"] = _escape(f"{node.name}: {source}{made}{far}")
        digraph.node(f"{self.prefix}{node.key}", _lines(node.lines), **options)


# Views cost nothing: they are to be seen, but not to catch the eye.
_QUIET: Final = {"style": "filled", "fontsize": "8", "fontcolor": _GREY, "color": "#CCCCCC"}
_LOOKS: Final[Mapping[str, Mapping[str, str]]] = {
    "input": {"shape": "ellipse", "margin": "0"},
    "output": {"shape": "ellipse", "margin": "0"},
    "constant": {"shape": "note", **_QUIET},
    "view": _QUIET,
}


def region_lines(region: DrawnRegion) -> list[str]:
    """What is written above a region's operators."""
    by = {"sepc": "", "tvm": " by TVM", "torch": " by PyTorch"}.get(region.kernel, "")
    lines = [f"{region.name}: {region.kind}{by}" if region.kind else region.name]
    lines += textwrap.wrap(region.reason or region.tiling, _WIDTH)
    bound = f" ({region.bottleneck})" if region.bottleneck else ""
    parts = [f"{time_text(region.predicted_us)} predicted{bound}"] if region.predicted_us else []
    parts += [f"{time_text(region.measured_us)} measured"] if region.measured_us is not None else []
    parts += [bytes_text(region.bytes_moved)] if region.bytes_moved else []
    parts += [f"{flops_text(region.flops)}FLOP"] if region.flops else []
    # A figure stays on one line with its unit.
    wrapped = textwrap.wrap(", ".join(part.replace(" ", "_") for part in parts), _WIDTH)
    return [*lines, *(line.replace("_", " ") for line in wrapped)]


def link(source: str) -> str:
    """A line of a file as an address; text editors and browsers open the file."""
    path, _, line = source.rpartition(":")
    return f"{Path(path).as_uri()}#L{line}" if PurePath(path).is_absolute() else f"{path}#L{line}"


def _lines(lines: Iterable[str], align: str = "n") -> str:
    """A label that Graphviz shows as it is, whatever it holds; lines are centred, or "l" to the left."""
    return graphviz.nohtml("".join(_joined([graphviz.escape(line) for line in lines], align)))


def _joined(lines: Sequence[str], align: str) -> Iterator[str]:
    for index, line in enumerate(lines):
        # The last line is centred unless it ends in its alignment as well.
        yield line + (rf"\{align}" if align != "n" or index < len(lines) - 1 else "")


def _escape(text: str) -> str:
    return str(graphviz.escape(text))


def _legend(regions: Iterable[DrawnRegion], marks: Iterable[str]) -> str:
    """A row of the tints that occur, with their meaning; then of the marks."""
    there = {region.colour for region in regions}
    order = [
        name for name in (*COLOURS, *sorted(there - {"", *COLOURS}), *([""] if "" in there else [])) if name in there
    ]
    cells = [f'<td bgcolor="{colour_of(name).tint}">{html.escape(colour_of(name).words)}</td>' for name in order]
    cells += [
        f'<td border="2" color="{colour.strong}">{colour.words}</td>'
        for name, colour in MARKS.items()
        if name in set(marks)
    ]
    cells = cells or [f'<td bgcolor="{OTHER.tint}">operators as captured</td>']
    return f'<<table border="0" cellborder="0" cellspacing="6"><tr>{"".join(cells)}</tr></table>>'
