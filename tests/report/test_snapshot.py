"""Graphs as plain values: what is in them, and what differs between two."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from sepc.passes import gather_means
from sepc.report.snapshot import Snapshot, compare
from tests.helpers import Function, passes_until
from tests.report.graphs import after_folding, before_folding, blocks

X = torch.randn(1, 8, 6, 6)


def net() -> nn.Module:
    """A convolution with two readers, one of which is a view."""

    def run(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x).relu()
        return y.permute(0, 2, 3, 1), y + self.bias

    return Function(run, conv=nn.Conv2d(8, 8, 3), bias=torch.ones(8, 1, 1))


def test_a_captured_graph_has_its_operators_with_the_shapes_of_their_constants() -> None:
    module, _ = passes_until("canonicalize", net(), X)
    found = Snapshot.of(module, "now")
    assert found.title == "now"
    assert not found.regions
    nodes = {node.title: node for node in found.nodes}
    assert [node.role for node in found.nodes] == ["input", "operator", "operator", "view", "operator", "output"]
    assert nodes["conv2d"].constants == ("8×8×3×3", "8")
    assert nodes["conv2d"].type == "1×8×4×4"
    assert nodes["add"].inputs == (nodes["relu"].key,)
    assert nodes["add"].constants == ("8×1×1",)
    assert nodes["output"].inputs == (nodes["permute"].key, nodes["add"].key)
    assert re.search(r"helpers\.py:\d+$", nodes["conv2d"].source)  # That calls the function.
    assert nodes["conv2d"].lines == ("conv2d", "1×8×4×4", "by 8×8×3×3, 8")


def test_regions_are_opened_and_joined_with_what_is_outside() -> None:
    module, _ = passes_until("choose-tiling", net(), X)
    found = Snapshot.of(module)
    convolution = next(one for one in found.regions.values() if one.kind == "convolution")
    inside = [node for node in found.nodes if node.region == convolution.name]
    assert [node.title for node in inside] == ["conv2d", "relu"]
    assert all(node.key == f"{convolution.name}/{node.name}" for node in inside)
    keys = {node.key for node in found.nodes}
    assert all(set(node.inputs) <= keys for node in found.nodes)
    readers = {node.title for node in found.nodes if inside[-1].key in node.inputs}
    assert readers == {"permute", "add"}
    assert convolution.kernel == "sepc"
    assert convolution.predicted_us > 0
    assert convolution.colour == convolution.bottleneck
    assert "registers" in convolution.tiling


def test_each_result_of_a_region_with_two_has_its_own_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def squeeze(self: Function, x: torch.Tensor) -> torch.Tensor:
        y = self.depth(x).relu()
        return y * y.mean((2, 3), keepdim=True)

    monkeypatch.setattr(gather_means, "_times_us", lambda problems, pools, context: (2.0, 1.0))
    module, _ = passes_until("gather-means", Function(squeeze, depth=nn.Conv2d(8, 8, 3, groups=8)), X)
    found = Snapshot.of(module)
    nodes = {node.key: node for node in found.nodes}
    assert not any(node.title == "getitem" for node in found.nodes)
    product = next(node for node in found.nodes if node.title == "mul")
    assert {nodes[key].title for key in product.inputs} == {"relu", "mean"}


def test_what_is_removed_and_what_is_new() -> None:
    removed, new = compare(before_folding(), after_folding())
    assert removed == {"conv2d": "removed", "batch_norm": "removed"}
    assert new == {"region_0": "new", "region_0/conv2d_1": "new"}


def test_a_node_that_stays_with_another_type_has_changed() -> None:
    before = blocks(1)
    relu = replace(before.nodes[2], type="1×8×4×4 float16")
    after = replace(before, nodes=(*before.nodes[:2], relu, *before.nodes[3:]))
    assert compare(before, after) == ({}, {relu.key: "changed"})
    assert compare(before, before) == ({}, {})
