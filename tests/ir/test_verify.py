"""Every breach of the IR contract is reported, with the node."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sepc.errors import VerificationError
from sepc.ir.ops import aten
from sepc.ir.types import propagate_types
from sepc.ir.verify import relative_difference, verify, verify_numerics

MODE = FakeTensorMode()


def graph_of(target: object = aten.relu.default) -> fx.GraphModule:
    """relu(x + weight), or another operator in place of relu."""
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer("weight", torch.ones(4))
    x = graph.placeholder("x")
    x.meta["val"] = MODE.from_tensor(torch.ones(4))
    added = graph.call_function(aten.add.Tensor, (x, graph.get_attr("weight")))
    graph.output((graph.call_function(target, (added,)),))
    module = fx.GraphModule(root, graph)
    propagate_types(module, MODE)
    return module


def node_of(module: fx.GraphModule, op: str) -> fx.Node:
    return (
        next(iter(module.graph.find_nodes(op=op))) if op != "call_function" else module.graph.output_node().args[0][0]
    )


def breach(module: fx.GraphModule, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify(module)


def with_region(result: object = None) -> fx.GraphModule:
    """A graph that calls a region; `result` replaces what the region returns."""
    region, module = graph_of(), graph_of()
    (first,) = region.graph.output_node().args[0]
    region.graph.output_node().args = (result if result is not None else first,)
    module.add_submodule("region_0_relu", region)
    node = node_of(module, "call_function")
    with module.graph.inserting_after(node):
        called = module.graph.call_module("region_0_relu", (node,))
    called.meta["val"] = node.meta["val"]
    module.graph.output_node().args = ((called,),)
    return module


def test_a_good_graph_and_a_good_region_pass() -> None:
    verify(graph_of())
    verify(with_region())


def test_a_node_without_a_type() -> None:
    module = graph_of()
    del node_of(module, "call_function").meta["val"]
    breach(module, r"node 'relu_default'\n.*no tensor type")


def test_an_unknown_annotation() -> None:
    module = graph_of()
    node_of(module, "call_function").meta["sepc_colour"] = "red"
    breach(module, "unknown annotation 'sepc_colour'")


def test_an_origin_of_another_type() -> None:
    module = graph_of()
    node_of(module, "call_function").meta["sepc_origin"] = "frontend"
    breach(module, "sepc_origin is str")


def test_a_missing_constant() -> None:
    module = graph_of()
    del module.weight
    breach(module, "no tensor 'weight'")


def test_a_constant_of_another_shape_than_its_type() -> None:
    module = graph_of()
    module.weight = torch.ones(5)
    breach(module, r"float32\[5\], its type says torch.float32\[4\]")


def test_a_constant_with_a_dotted_name() -> None:
    module = graph_of()
    node_of(module, "get_attr").target = "block.weight"
    breach(module, "is not flat")


def test_an_operator_in_place() -> None:
    breach(graph_of(aten.relu_.default), "aten.relu_.default changes its argument")


def test_a_call_that_is_not_aten() -> None:
    breach(graph_of(torch.relu), "is not an ATen overload")


def test_a_method_call() -> None:
    module = graph_of()
    node = node_of(module, "call_function")
    node.op, node.target = "call_method", "relu"
    breach(module, "call_method")


def test_a_region_that_is_no_graph() -> None:
    module = with_region()
    module.region_0_relu = nn.ReLU()
    breach(module, "is ReLU, not a GraphModule")


def test_a_region_with_three_outputs() -> None:
    module = with_region()
    region = module.region_0_relu
    (first,) = region.graph.output_node().args
    region.graph.output_node().args = ((first, first, first),)
    breach(module, "must return one tensor")


def test_a_breach_inside_a_region() -> None:
    module = with_region()
    node_of(module.region_0_relu, "placeholder").meta["sepc_colour"] = "red"
    breach(module, "unknown annotation")


def test_an_output_that_is_not_a_tensor() -> None:
    module = graph_of()
    module.graph.output_node().args = ((3,),)
    breach(module, "returns 3, which is not a tensor")


def test_relative_difference_handles_zeros_infinities_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    assert relative_difference(torch.tensor([0.0]), torch.tensor([0.5])) == 0.5
    assert relative_difference(torch.tensor([2.0, inf, nan]), torch.tensor([2.0, inf, nan])) == 0.0
    assert relative_difference(torch.tensor([2.0, inf]), torch.tensor([1.0, inf])) == 0.5
    assert not relative_difference(torch.tensor([1.0]), torch.tensor([nan])) <= 1.0
    assert relative_difference(torch.empty(0), torch.empty(0)) == 0.0


def test_numeric_verification_names_the_pass_and_the_output() -> None:
    one, other = torch.ones(2), torch.tensor([1.0, 1.1])
    assert verify_numerics("fold", (one,), (one,)) == 0.0
    with pytest.raises(VerificationError, match=r"fold changed the result.*\n.*output 1"):
        verify_numerics("fold", (one, one), (one, other))
    with pytest.raises(VerificationError, match="number of outputs"):
        verify_numerics("fold", (one,), (one, one))
    with pytest.raises(VerificationError, match="type of an output"):
        verify_numerics("fold", (one,), (torch.ones(3),))
