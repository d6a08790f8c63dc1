"""Where Graphviz puts the nodes of a graph, as plain values that a page draws from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sepc.report.dot import draw, link, region_lines
from sepc.report.folding import shorten
from sepc.report.snapshot import DrawnNode, DrawnRegion, Mark, Snapshot
from sepc.report.visualize import render

_POINTS_PER_INCH = 72


def placed(snapshot: Snapshot, marks: Mapping[str, Mark]) -> dict[str, Any]:
    """The graph with coordinates: points, from the upper left corner, those of nodes their centres.

    Raises GraphvizMissingError where there is no program `dot`.
    """
    snapshot = shorten(snapshot)
    found = json.loads(render(draw(snapshot, folds=False), "json0"))
    objects = found.get("objects", [])
    _, _, width, height = _numbers(found["bb"])
    boxes = {one["name"]: one["bb"] for one in objects if "bb" in one}
    points = {one["name"]: one for one in objects if "pos" in one}
    nodes = [_node(node, points[node.key], height, marks) for node in snapshot.nodes]
    regions = [_region(one, boxes[f"cluster_{name}"], height, marks) for name, one in snapshot.regions.items()]
    edges = [_path(one["pos"], height) for one in found.get("edges", [])]
    return {"width": width, "height": height, "nodes": nodes, "regions": regions, "edges": edges}


def _node(node: DrawnNode, place: Mapping[str, str], height: float, marks: Mapping[str, Mark]) -> dict[str, Any]:
    x, y = _numbers(place["pos"])
    return {
        "key": node.key,
        "name": node.name,
        "lines": node.lines,
        "role": node.role,
        "region": node.region,
        "source": node.source,
        "link": link(node.source) if node.source else "",
        "by": node.made_by,
        "mark": marks.get(node.key, ""),
        "x": x,
        "y": round(height - y, 1),
        "width": round(float(place["width"]) * _POINTS_PER_INCH, 1),
        "height": round(float(place["height"]) * _POINTS_PER_INCH, 1),
    }


def _region(region: DrawnRegion, box: str, height: float, marks: Mapping[str, Mark]) -> dict[str, Any]:
    left, bottom, right, top = _numbers(box)
    return {
        "name": region.name,
        "lines": region_lines(region),
        "colour": region.colour,
        "mark": marks.get(region.name, ""),
        "x": left,
        "y": round(height - top, 1),
        "width": round(right - left, 1),
        "height": round(top - bottom, 1),
    }


def _path(position: str, height: float) -> str:
    """An edge as the data of an SVG path: Graphviz gives the arrow's tip first, then a Bézier curve."""
    tip, *curve = position.split()
    points = [_point(one, height) for one in curve]
    return f"M{points[0]}C{' '.join(points[1:])}L{_point(tip.removeprefix('e,'), height)}"


def _point(text: str, height: float) -> str:
    x, y = _numbers(text)
    return f"{x:g},{round(height - y, 1):g}"


def _numbers(text: str) -> Iterable[float]:
    return [round(float(one), 1) for one in text.split(",")]
