"""The pictures: what they show, and what is written with and without Graphviz's program."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import graphviz
import pytest
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sepc.report.dot import bytes_text, graph_to_dot, op_name, shape_text, short_op, write_graph


@dataclass(frozen=True)
class FakeRegion:
    name: str = "region_0_dense"
    kind: str = "dense"
    ops: list[str] = field(default_factory=lambda: ["conv2d", "relu"])
    kernel: str = "sepc"
    tiling: object = "rows 4, channels 32"
    predicted_us: float = 12.5
    bytes_moved: int = 1_500_000
    flops: int = 3_000_000


def graph_of_one_region() -> fx.GraphModule:
    """A placeholder, a region, a view and an output, with shapes."""
    body = fx.Graph()
    x = body.placeholder("x")
    weight = body.get_attr("weight")
    y = body.call_function(torch.ops.aten.conv2d.default, (x, weight))
    body.output(body.call_function(torch.ops.aten.relu.default, (y,)))
    holder = nn.Module()
    holder.register_buffer("weight", torch.zeros(8, 3, 1, 1))
    root = nn.Module()
    root.add_module("region_0_dense", fx.GraphModule(holder, body))
    top = fx.Graph()
    region = top.call_module("region_0_dense", (top.placeholder("image"),))
    top.output(top.call_function(torch.ops.aten.permute.default, (region, [0, 2, 3, 1])))
    module = fx.GraphModule(root, top)
    ShapeProp(module).propagate(torch.zeros(1, 3, 4, 4))
    for node in module.graph.nodes:
        node.meta["val"] = torch.empty(node.meta["tensor_meta"].shape, device="meta")
    return module


def test_region_shows_everything_known_of_it() -> None:
    source = graph_to_dot(graph_of_one_region(), [FakeRegion()]).source
    for text in (
        "region_0_dense (dense)",
        "conv2d, relu",
        "rows 4, channels 32",
        "12.5 µs predicted",
        "1.5 MB",
        "3 MFLOP",
    ):
        assert text in source


def test_edges_carry_shapes_and_views_are_named() -> None:
    source = graph_to_dot(graph_of_one_region(), [FakeRegion()]).source
    assert "image -> region_0_dense" in source
    assert "1×3×4×4" in source
    assert "1×8×4×4" in source
    assert "permute" in source


def test_colour_says_who_runs_it() -> None:
    module = graph_of_one_region()
    lines = [
        next(
            line for line in graph_to_dot(module, [FakeRegion(kernel=kernel)]).source.splitlines() if "12.5 µs" in line
        ).split("fillcolor=")[1]
        for kernel in ("sepc", "tvm", "torch", "other")
    ]
    assert len(set(lines)) == 4


def test_region_without_figures_shows_its_operators() -> None:
    source = graph_to_dot(graph_of_one_region()).source
    assert "conv2d, relu" in source
    assert "predicted" not in source


def test_labels_are_shown_literally() -> None:
    region = FakeRegion(tiling='<b> "quoted" back\\slash')
    assert r"\"quoted\" back\\slash" in graph_to_dot(graph_of_one_region(), [region]).source


def test_graph_source_is_written_where_the_program_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    written = write_graph(graph_of_one_region(), tmp_path / "deep" / "model.svg", [FakeRegion()])
    assert written == tmp_path / "deep" / "model.dot"
    assert written.read_text(encoding="utf-8").startswith("digraph")


def test_picture_is_written_where_the_program_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(digraph: graphviz.Digraph, **options: str) -> bytes:
        assert "region_0_dense" in digraph.source
        return f"<{options['format']}>".encode()

    monkeypatch.setattr(graphviz.Digraph, "pipe", draw)
    written = write_graph(graph_of_one_region(), tmp_path / "model", [FakeRegion()])
    assert written == tmp_path / "model.svg"
    assert written.read_bytes() == b"<svg>"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(1, 32, 7, 7), "1×32×7×7"),
        (torch.empty(2, dtype=torch.int64), "2 int64"),
        (torch.empty(()), "scalar"),
        ((torch.empty(1),), ""),
        (None, ""),
    ],
)
def test_shape_text(value: object, text: str) -> None:
    assert shape_text(value) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1500, "1.5 kB"), (2_340_000, "2.34 MB")])
def test_bytes_text(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_op_name() -> None:
    assert op_name(torch.ops.aten.conv2d.default) == "conv2d"
    assert op_name(len) == "len"


@pytest.mark.parametrize("op", ["conv2d", "conv2d.default", "aten.conv2d.default"])
def test_short_op(op: str) -> None:
    assert short_op(op) == "conv2d"
