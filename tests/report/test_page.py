"""The page without a browser: what its tables, pictures and data hold."""

from __future__ import annotations

import base64
import gzip
import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import sepc
from sepc.report.page import page

VOID_ELEMENTS = {"br", "meta", "input"}


class Page(HTMLParser):
    """The text of every cell of every table, by the table's id; elements must close in the order that they open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.table = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)
        if tag == "table":
            self.table = str(dict(attrs)["id"])
            self.rows[self.table] = []
        elif tag == "tr":
            self.rows[self.table].append([])
        elif tag in ("td", "th"):
            self.rows[self.table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[self.table][-1][-1] += data
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    @property
    def data(self) -> dict[str, Any]:
        """What the scripts show."""
        data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(self.scripts[0])))
        return data


@pytest.fixture(scope="module")
def text(explanation: sepc.Explanation) -> str:
    return page(explanation)


def test_the_tables_have_every_region_and_every_decision(explanation: sepc.Explanation, tmp_path: Path) -> None:
    written = explanation.to_html(tmp_path / "deep" / "model.html")
    assert written == tmp_path / "deep" / "model.html"
    tables = Page(written.read_text(encoding="utf-8"))
    assert not tables.open
    assert [row[1] for row in tables.rows["regions"][1:]] == [one.name for one in explanation.regions]
    assert [row[3].strip() for row in tables.rows["decisions"][1:]] == [one.message for one in explanation.decisions]
    assert [row[1] for row in tables.rows["passes"][1:]] == [one.name for one in explanation.passes]
    assert [row[0] for row in tables.rows["totals"][1:]] == ["sepc", "TVM", "PyTorch"]
    assert {row[0] for row in tables.rows["bottlenecks"][1:]} == explanation.us_by_bottleneck.keys()
    fallback = next(row for row in tables.rows["regions"] if row[3] == "PyTorch")
    assert "no stage for aten.baddbmm.default" in fallback[-1]
    for rows in tables.rows.values():
        assert len({len(row) for row in rows}) == 1


def test_measured_times_have_a_column_if_there_are_some(explanation: sepc.Explanation) -> None:
    profiled = replace(explanation, regions=tuple(replace(one, measured_us=7.5) for one in explanation.regions))
    rows = Page(page(profiled)).rows["regions"]
    assert rows[0].index("measured µs") == 5
    assert {row[5] for row in rows[1:]} == {"7.5"}


def test_the_page_needs_no_network_and_shows_text_as_it_is(explanation: sepc.Explanation) -> None:
    text = page(replace(explanation, model="<b>&amp;"))
    attributes = Page(text).attributes
    assert not {name for name, _ in attributes} & {"src", "action"}
    assert all(str(value).startswith("#") for name, value in attributes if name in ("href", "xlink:href"))
    assert not any(word in text for word in ("http:", "https:", "@import", "url(h"))
    assert "<h1>&lt;b&gt;&amp;amp; by sepc</h1>" in text


def test_names_in_pictures_are_unique(text: str) -> None:
    names = [str(value) for name, value in Page(text).attributes if name == "id"]
    assert len(names) == len(set(names))
    for kind in ("efficiency-gap", "waterline", "memory"):
        assert f"plot-{kind}" in names


def test_there_is_a_graph_for_each_pass_that_did_something(explanation: sepc.Explanation, text: str) -> None:
    graphs = Page(text).data["graphs"]
    assert [one["title"] for one in graphs] == [one.title for one in explanation.graphs]
    assert graphs[0]["title"] == "input"
    folded = next(one for one in graphs if one["title"] == "fold-batch-norm")
    assert "batch_norm" in folded["removed"]
    assert "-    batch_norm = " in folded["diff"]
    assert {"new"} < {node["mark"] for node in folded["nodes"]}
    assert [one["name"] for one in graphs[-1]["regions"]] == [one.name for one in explanation.regions]


def test_nodes_lie_within_the_picture_and_within_their_regions(text: str) -> None:
    for graph in Page(text).data["graphs"]:
        regions = {one["name"]: one for one in graph["regions"]}
        for node in graph["nodes"]:
            box = regions.get(node["region"], {"x": 0, "y": 0, "width": graph["width"], "height": graph["height"]})
            assert box["x"] - 1 <= node["x"] - node["width"] / 2
            assert node["x"] + node["width"] / 2 <= box["x"] + box["width"] + 1
            assert box["y"] - 1 <= node["y"] - node["height"] / 2
            assert node["y"] + node["height"] / 2 <= box["y"] + box["height"] + 1


def test_a_region_has_its_kernel_if_it_is_compiled_and_else_the_reason(
    explanation: sepc.Explanation, text: str
) -> None:
    regions = Page(text).data["regions"]
    for one in explanation.regions:
        assert bool(regions[one.name]["kernel"]) == (one.kernel != "torch")
        assert ["why", one.reason] in regions[one.name]["rows"] or not one.reason
    first = next(one for one in explanation.regions if one.kernel == "sepc")
    assert regions[first.name]["kernel"] == explanation.source(first.name, "tirx")


def test_a_region_has_the_decisions_that_are_about_it(explanation: sepc.Explanation, text: str) -> None:
    regions = Page(text).data["regions"]
    first, second = (regions[one.name]["decisions"] for one in explanation.regions if one.kind == "convolution")
    rejected = [False, "fuse: not fused: no gain; 2.0 µs without, 4.0 µs with it"]
    assert rejected in first
    assert rejected in second
    (other,) = (regions[one.name]["decisions"] for one in explanation.regions if one.kernel == "torch")
    assert rejected not in other


def test_without_graphviz_and_matplotlib_the_page_says_so(
    explanation: sepc.Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page(explanation)
    assert "Graphviz is not installed; install Graphviz" in text
    assert "Pictures of costs need matplotlib; pip install matplotlib" in text
    assert not Page(text).data["graphs"]
    assert len(Page(text).rows["regions"]) == 1 + len(explanation.regions)


def test_the_page_of_mobilenet_has_less_than_five_megabytes(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("mobilenetv2_100").eval()
    found = sepc.explain(model, torch.randn(1, 3, 224, 224), target="x86-64-v3", num_threads=1)
    assert found.to_html(tmp_path / "report.html").stat().st_size < 5e6
