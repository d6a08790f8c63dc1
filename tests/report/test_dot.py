"""Graphs as Graphviz draws them: goldens of small ones, and that `dot` takes a large one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from sepc.report.dot import draw, graph_to_dot
from sepc.report.palette import COLOURS
from sepc.report.snapshot import DrawnRegion, Snapshot
from sepc.report.visualize import render
from tests.helpers import Function, passes_until
from tests.report.graphs import after_folding, before_folding, blocks, without_repetition

Golden = Callable[[str, str], None]


def test_a_region_is_a_box_with_kernel_tiling_bytes_and_times(golden: Golden) -> None:
    golden("report/region", draw(after_folding()).source)


def test_two_graphs_stand_side_by_side_with_their_differences_marked(golden: Golden) -> None:
    golden("report/side_by_side", draw(after_folding(), before_folding()).source)


def test_blocks_that_repeat_are_drawn_once(golden: Golden) -> None:
    golden("report/folded", draw(blocks(5, in_regions=True), folds=True).source)


def test_small_graphs_are_drawn_whole_unless_asked_and_large_ones_folded() -> None:
    assert "× 5" not in draw(blocks(5)).source
    assert "× 5" in draw(blocks(5), folds=True).source
    assert "× 40" in draw(blocks(40)).source
    assert "× 40" not in draw(blocks(40), folds=False).source


@pytest.mark.parametrize("colour", ["compute", "L2", "DRAM", "tvm", "torch"])
def test_colour_and_legend_say_what_bounds_a_region_or_who_runs_it(colour: str) -> None:
    graph = after_folding()
    bound = {"bottleneck": "", "kernel": colour} if colour in ("tvm", "torch") else {"bottleneck": colour}
    source = draw(replace(graph, regions={"region_0": replace(graph.regions["region_0"], **bound)})).source
    assert f'fillcolor="{COLOURS[colour].tint}"' in source
    assert f'bgcolor="{COLOURS[colour].tint}">{COLOURS[colour].words}<' in source
    others = [one for name, one in COLOURS.items() if name != colour]
    assert not [one.words for one in others if f">{one.words}<" in source]


def test_a_level_without_a_colour_of_its_own_is_named() -> None:
    graph = after_folding()
    source = draw(replace(graph, regions={"region_0": DrawnRegion("region_0", bottleneck="shared")})).source
    assert ">bound by shared<" in source


def test_operators_link_to_their_source_lines() -> None:
    source = draw(after_folding()).source
    assert 'URL="file:///home/user/net.py#L3"' in source
    assert 'tooltip="conv2d_1: user/net.py:3"' in source


def test_labels_are_shown_literally() -> None:
    region = DrawnRegion("region_0", kind="odd", tiling='<b> "quoted" back\\slash')
    source = draw(replace(after_folding(), regions={"region_0": region})).source
    assert r"<b> \"quoted\" back\\slash" in source
    assert b"&lt;b&gt; &quot;quoted&quot; back\\slash" in render(
        draw(replace(after_folding(), regions={"region_0": region})), "svg"
    )


def test_a_graph_of_the_compiler_is_drawn_at_any_stage() -> None:
    model = Function(lambda self, x: self.conv(x).relu(), conv=nn.Conv2d(8, 8, 3))
    x = torch.randn(1, 8, 6, 6)
    captured = graph_to_dot(passes_until("promote", model, x)[0]).source
    planned = graph_to_dot(passes_until("choose-tiling", model, x)[0]).source
    assert "conv2d" in captured
    assert "cluster" not in captured
    assert re.search(r"µs predicted \(\w+\), .* kB, .* kFLOP", planned)


@pytest.mark.parametrize("graph", [without_repetition(500), blocks(166)], ids=["different", "repeated"])
def test_dot_draws_500_nodes_in_reasonable_time(graph: Snapshot) -> None:
    assert len(graph.nodes) >= 500
    began_s = time.perf_counter()
    picture = render(draw(graph), "svg")
    assert time.perf_counter() - began_s < 30
    assert picture.count(b'class="node"') == (501 if graph.title == "different" else 5)
