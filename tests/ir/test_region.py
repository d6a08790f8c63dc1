"""Regions: extraction keeps the meaning, and the helpers read what is there."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from sepc.errors import VerificationError
from sepc.frontend.export import capture
from sepc.ir import ops, region
from sepc.passes.manager import finish
from tests.helpers import Function, passes_until

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def captured() -> fx.GraphModule:
    model = Function(lambda self, x, y: (self.conv(x).relu() + y, y), conv=nn.Conv2d(4, 4, 3, padding=1))
    return capture(model.eval(), (X, X.clone())).graph_module


def calls(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


def test_extraction_moves_nodes_and_constants_and_keeps_the_result() -> None:
    module = captured()
    expected = module(X, X)
    nodes = calls(module)
    node = region.extract(module, nodes, "region_0_convolution", region.RegionInfo("convolution"), "group")
    finish(module, "group")
    graph = region.submodule(module, node)
    assert not calls(module)
    assert not module.graph.find_nodes(op="get_attr")
    assert [str(one.target).split(".")[1] for one in region.computations(graph)] == ["conv2d", "relu", "add"]
    assert [one.op for one in graph.graph.nodes][:4] == ["placeholder", "placeholder", "get_attr", "get_attr"]
    assert region.result(graph) is region.computations(graph)[-1]
    assert [str(one) for one in region.inputs(node)] == [str(one) for one in region.placeholders(graph)]
    assert ops.shape(node) == (2, 4, 6, 6)
    for result, reference in zip(module(X, X), expected, strict=True):
        assert torch.equal(result, reference)


def test_extraction_remembers_where_the_region_comes_from() -> None:
    module = captured()
    nodes = calls(module)
    names = tuple(node.name for node in nodes)
    node = region.extract(module, nodes, "region_0_convolution", region.RegionInfo("convolution"), "group")
    origin = node.meta["sepc_origin"]
    assert (origin.pass_name, origin.nodes) == ("group", names)
    assert "helpers.py:" in origin.source


def test_results_are_listed_in_order_with_repetitions() -> None:
    module, _ = passes_until("group", Function(lambda self, x: [x.relu(), x, x]), X)
    first, second, third = region.results(module)
    assert region.is_region(first)
    assert second is third is module.graph.find_nodes(op="placeholder")[0]


def test_elements_are_the_results_taken_from_a_region_with_several() -> None:
    module, _ = passes_until("group", Function(lambda self, x: x.topk(2)[1] + x.topk(2)[1].abs()), X)
    for node, _ in region.regions(module):
        positions = [position for position, _ in region.elements(node)]
        assert positions == ([] if isinstance(node.meta["val"], torch.Tensor) else [1])


def test_what_is_no_region_is_said_so() -> None:
    module = captured()
    node = calls(module)[0]
    assert not region.is_region(node)
    assert not list(region.regions(module))
    with pytest.raises(VerificationError, match="Not a region"):
        region.info(node)
    with pytest.raises(VerificationError, match="has no graph"):
        region.submodule(module, node)
    module.graph.output_node().args = ((node, node, node),)
    with pytest.raises(VerificationError, match="returns one node, or two"):
        region.result(module)
