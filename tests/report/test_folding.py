"""Stages that repeat: which are found, and what is left of a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sepc.report.folding import LONG, Repeat, fold, shorten
from sepc.report.snapshot import Snapshot
from tests.report.graphs import blocks, node, without_repetition


def test_equal_blocks_are_drawn_once() -> None:
    folded, (repeat,) = fold(blocks(5))
    assert repeat == Repeat(("conv_0", "relu_0", "add_0"), 5, 0.0)
    assert [one.key for one in folded.nodes] == ["x", "conv_0", "relu_0", "add_0", "output"]
    assert folded.nodes[-1].inputs == ("add_0",)
    assert folded.nodes[1].inputs == ("x",)


def test_regions_stay_whole_and_their_times_add_up() -> None:
    folded, (repeat,) = fold(blocks(4, in_regions=True))
    assert (repeat.times, repeat.predicted_us) == (4, 40.0)
    assert list(folded.regions) == ["region_0"]
    assert repeat.members[-1] == "region_0"


def test_a_graph_without_repetition_stays_as_it_is() -> None:
    graph = without_repetition(40)
    assert fold(graph) == (graph, ())


@pytest.mark.parametrize("change", [{"type": "1×8×4×4 float16"}, {"constants": ("8×8×1×1",)}, {"title": "mul"}])
def test_a_block_that_differs_splits_the_repetition(change: dict[str, Any]) -> None:
    graph = blocks(9)
    at = 1 + 3 * 4
    changed = replace(graph.nodes[at], **change)
    _, repeats = fold(replace(graph, nodes=(*graph.nodes[:at], changed, *graph.nodes[at + 1 :])))
    assert [one.times for one in repeats] == [4, 4]


def test_a_reader_of_a_block_that_is_not_drawn_reads_the_one_that_is() -> None:
    graph = blocks(4)
    late = node("late", "mul", "add_1", "add_3")
    folded, _ = fold(replace(graph, nodes=(*graph.nodes, late)))
    assert folded.nodes[-1].inputs == ("add_0",)


def test_a_few_long_lines_stay() -> None:
    graph = without_repetition(200)
    last = replace(graph.nodes[-1], inputs=("x", "op_0", *graph.nodes[-1].inputs))
    graph = replace(graph, nodes=(*graph.nodes[:-1], last))
    assert shorten(graph) is graph


def test_of_too_many_lines_the_long_ones_are_left_out_and_that_is_said() -> None:
    nodes = [node("x", "x")]
    for index in range(150):  # Each reads all before it.
        nodes.append(node(f"cat_{index}", "cat", *(one.key for one in nodes)))
    nodes.append(node("late", "mul", "x"))
    found = shorten(Snapshot("dense", tuple(nodes), {}))
    cat = found.nodes[150]
    assert len(cat.inputs) == LONG - 1
    assert len(cat.far) == 150 - len(cat.inputs)
    assert cat.lines[-1] == f"and {len(cat.far)} from above"
    assert found.nodes[-1].inputs == ("x",)
    assert not found.nodes[20].far
