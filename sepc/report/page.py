"""An explanation as a page: one file with its own style and scripts, which needs no network.

Tables and pictures are HTML and SVG; graphs, differences and sources are data, compressed, that a script shows.
"""

from __future__ import annotations

import base64
import difflib
import gzip
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import jinja2
from markupsafe import Markup

from sepc.cost_model.roofline import Roofline
from sepc.progress import progress
from sepc.report.cost_plots import caption
from sepc.report.dot import link
from sepc.report.explanation import WHO, Explanation, RegionExplanation
from sepc.report.explanation_text import nodes_text
from sepc.report.history import Step
from sepc.report.palette import COLOURS, MARKS, OTHER, colour_of
from sepc.report.placement import placed
from sepc.report.plots import KINDS, MatplotlibMissingError, inline_svg
from sepc.report.snapshot import compare
from sepc.report.visualize import GraphvizMissingError
from sepc.report.words import bytes_text, flops_text, percent, short_op, short_source, short_sources, time_text

if TYPE_CHECKING:
    from sepc.passes.manager import Note

TEMPLATE: Final = "report.html.jinja"
CONTEXT_LINES: Final = 2


def page(explanation: Explanation) -> str:
    """The page as text, in HTML."""
    loader = jinja2.PackageLoader("sepc", "report/templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(bytes=bytes_text, flops=flops_text, nodes=nodes_text, operator=short_op)
    environment.filters.update(sources=short_sources, time=time_text, link=link)

    def part(name: str) -> Markup:
        """A part of the page that is no template, as it is."""
        return Markup(loader.get_source(environment, name)[0])

    data, missing = _data(explanation)
    plots, no_plots = _plots(explanation)
    return environment.get_template(TEMPLATE).render(
        explanation=explanation,
        who=WHO,
        percent=percent,
        part=part,
        colours={**COLOURS, "other": OTHER},
        marks=MARKS,
        colour_of=colour_of,
        plots=plots,
        missing=[text for text in (missing, no_plots) if text],
        data=base64.b64encode(gzip.compress(json.dumps(data).encode(), mtime=0)).decode(),
    )


def _plots(explanation: Explanation) -> tuple[list[tuple[str, str, Markup]], str]:
    """The pictures of costs with their names and captions; or why there are none."""
    try:
        # They are made here and hold no text that is not escaped.
        return [
            (kind, caption(explanation, kind), Markup(inline_svg(explanation, kind)))
            for kind in progress(KINDS, "pictures")
        ], ""
    except MatplotlibMissingError as error:
        return [], f"{error.what}; {error.fix}."


def _data(explanation: Explanation) -> tuple[dict[str, Any], str]:
    """What the scripts show; and why there are no graphs, where there are none."""
    steps = list(explanation.evidence.history)
    final = steps[-1].snapshot.with_figures(explanation.regions)
    steps[-1] = Step(final, steps[-1].text)
    missing = ""
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Graphviz is a process for each.
            graphs = list(progress(pool.map(_graph, [None, *steps[:-1]], steps), "graphs", len(steps)))
    except GraphvizMissingError as error:
        graphs, missing = [], f"{error.what}; {error.fix}."
    inside = {one.name: {one.name} for one in explanation.regions}
    for node in final.nodes:
        inside.get(node.region, set()).add(node.name)
    regions = {
        one.name: {
            "rows": _rows(one, explanation.roofline),
            "ops": list(map(short_op, one.ops)),
            "sources": [(short_source(source), link(source)) for source in one.sources],
            "decisions": [_decision(note) for note in explanation.decisions if _is_about(note, one, inside[one.name])],
            "kernel": explanation.source(one.name) if explanation.has_source(one.name) else "",
        }
        for one in progress(explanation.regions, "sources")
    }
    return {"graphs": graphs, "regions": regions}, missing


def _is_about(note: Note, region: RegionExplanation, names: set[str]) -> bool:
    """Whether a decision is about a region, or its operators, or made it."""
    return not names.isdisjoint(note.nodes) or region.name in re.findall(r"\w+", note.message)


def _decision(note: Note) -> tuple[bool, str]:
    """Whether it was taken, and what it is."""
    times = (
        ""
        if note.before_us is None or note.after_us is None
        else f"; {time_text(note.before_us)} without, {time_text(note.after_us)} with it"
    )
    return note.taken, f"{note.pass_name}: {note.message}{times}"


def _graph(before: Step | None, after: Step) -> dict[str, Any]:
    """A graph as the page draws it, with what the pass that made it did."""
    if before is None:
        return {
            "title": after.snapshot.title,
            **placed(after.snapshot, {}),
            "removed": [],
            "diff": "",
            "text": after.text,
        }
    removed, marks = compare(before.snapshot, after.snapshot)
    title = after.snapshot.title
    diff = difflib.unified_diff(
        before.text.splitlines(),
        after.text.splitlines(),
        f"before {title}",
        f"after {title}",
        "",
        "",
        CONTEXT_LINES,
        "",
    )
    names = {node.key: node.name for node in before.snapshot.nodes}
    return {
        "title": title,
        **placed(after.snapshot, marks),
        "removed": [names.get(key, key) for key in removed],
        "diff": "\n".join(diff),
        "text": after.text,
    }


def _rows(one: RegionExplanation, roofline: Roofline) -> list[tuple[str, str]]:
    """What is told of a region beside its operators and its source."""
    rows = [("kind", one.kind), ("computed by", WHO[one.kernel])]
    rows += [("why", one.reason)] if one.reason else []
    rows += [("tiling", one.tiling)] if one.tiling else []
    rows += [("predicted", f"{time_text(one.predicted_us)}, bound by {one.bottleneck}")] if one.bottleneck else []
    rows += [("arithmetic alone", time_text(one.compute_us))] if one.compute_us else []
    rows += [("measured", time_text(one.measured_us))] if one.measured_us is not None else []
    ideal_us = roofline.compute_us(one.flops)
    rows += [("FLOPs", f"{flops_text(one.flops)}, at the peak {time_text(ideal_us)}")] if one.flops else []
    rows += [("bytes, once", bytes_text(one.bytes_moved))]
    return rows + [(f"bytes of {level}", bytes_text(count)) for level, count in one.bytes_per_level.items() if count]
