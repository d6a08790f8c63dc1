"""plan-layout: where copies are needed and where not, and that results come as PyTorch gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from sepc.ir import ops, region
from sepc.ir.layout import layout, same_strides
from sepc.ir.problem import channels_last_order, contiguous_strides
from tests.helpers import Function, passes_until

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
LAST = X.contiguous(memory_format=torch.channels_last)


def model(function: Callable[..., Any]) -> Function:
    layers: dict[str, nn.Module | torch.Tensor] = {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "depth": nn.Conv2d(4, 4, 3, groups=4),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "wide": nn.Conv2d(4, 4, 6),
        "linear": nn.Linear(4, 4),
        "norm": nn.LayerNorm(4),
        "image": torch.randn(4, 6, 6),
    }
    return Function(function, **layers)


def planned(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    return passes_until("plan-layout", model(function), *inputs)[0]


def copies(module: fx.GraphModule) -> list[fx.Node]:
    """The regions that copy."""
    return [node for node, _ in region.regions(module) if region.info(node).kind == "copy"]


def strides(node: fx.Node) -> tuple[int, ...]:
    return layout(node).strides


def is_channels_last(node: fx.Node) -> bool:
    shape = ops.shape(node)
    return same_strides(shape, strides(node), contiguous_strides(shape, channels_last_order(len(shape))))


@pytest.mark.parametrize("name", ["conv", "depth", "grouped"])
def test_a_region_with_channels_writes_them_innermost(name: str) -> None:
    module = planned(lambda self, x: getattr(self, name)(x).relu(), X)
    assert all(is_channels_last(node) for node, _ in region.regions(module) if region.info(node).kind == "convolution")


@pytest.mark.parametrize("x", [X, LAST], ids=["NCHW", "NHWC"])
def test_an_elementwise_region_keeps_the_order_of_its_first_full_operand(x: torch.Tensor) -> None:
    module = planned(lambda self, x: (x[:, :1] * x).relu().clone(), x)
    (node,) = (node for node, _ in region.regions(module))
    assert same_strides(ops.shape(node), strides(node), x.stride())


def test_a_concatenation_keeps_the_order_of_its_largest_input() -> None:
    module = planned(lambda self, x: torch.cat([x[:, :1], self.conv(x), x[:, :2]], 1).relu(), X)
    (node,) = (node for node, _ in region.regions(module) if region.info(node).kind == "concatenation")
    assert is_channels_last(node)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda self, x: self.linear(self.conv(x).permute(0, 2, 3, 1)), 0, id="permute before linear"),
        pytest.param(lambda self, x: self.norm(self.conv(x).permute(0, 2, 3, 1)), 0, id="permute before layer norm"),
        pytest.param(lambda self, x: self.conv(x).flatten(2).transpose(1, 2), 0, id="pixels as rows"),
        pytest.param(lambda self, x: self.depth(self.conv(x)[:, :, 1:, ::2]).amax((2, 3)), 1, id="a slice of pixels"),
        pytest.param(lambda self, x: self.linear(self.wide(x).flatten(1)), 0, id="flatten one pixel"),
        pytest.param(lambda self, x: self.conv(x).flatten(1).relu(), 1, id="flatten pixels and channels"),
        pytest.param(lambda self, x: self.conv(x).relu().view(2, 2, 2, 6, 6).sigmoid(), 0, id="split channels"),
    ],
)
def test_a_view_is_free_unless_strides_forbid_it(function: Callable[..., Any], expected: int) -> None:
    module = planned(function, LAST)
    assert len([node for node in copies(module) if node not in region.results(module)]) == expected


def test_a_view_lies_in_the_storage_of_its_base() -> None:
    module = planned(lambda self, x: self.conv(x).relu()[1:, 2:, 3:].permute(0, 2, 3, 1).exp(), LAST)
    base = next(node for node, _ in region.regions(module))
    views = [node for node in module.graph.nodes if node.op == "call_function"]
    assert [layout(view).base for view in views] == [base] * len(views)
    assert layout(views[-1]).offset == 144 + 2 + 3 * 24
    assert strides(views[-1]) == (144, 24, 4, 1)


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        pytest.param(lambda self, x: self.conv(x).exp(), X, False, id="dense, NCHW"),
        pytest.param(lambda self, x: self.depth(x).exp(), X, True, id="depthwise, NCHW"),
        pytest.param(lambda self, x: self.depth(x).exp(), LAST, False, id="depthwise, NHWC"),
        pytest.param(lambda self, x: self.grouped(x).exp(), X, True, id="grouped, NCHW"),
        pytest.param(lambda self, x: functional.max_pool2d(x, 2), X, True, id="pooling, NCHW"),
        pytest.param(lambda self, x: functional.max_pool2d(x, 2), LAST, False, id="pooling, NHWC"),
        pytest.param(lambda self, x: x.mean((2, 3), True), X, True, id="global pooling, NCHW"),
        pytest.param(lambda self, x: self.norm(x.permute(0, 2, 3, 1)), X, True, id="layer norm, NCHW"),
        pytest.param(lambda self, x: self.norm(x.permute(0, 2, 3, 1)), LAST, False, id="layer norm, NHWC"),
        pytest.param(lambda self, x: self.depth(x), X[:1, :, :3, :3].contiguous(), True, id="one image, NCHW"),
    ],
)
def test_what_loads_vectors_of_channels_gets_them_side_by_side(
    function: Callable[..., Any], x: torch.Tensor, expected: bool
) -> None:
    sources = [source for node in copies(planned(function, x)) for source in region.inputs(node)]
    assert any(layout(source).base.op == "placeholder" for source in sources) == expected


def test_a_region_of_pytorch_or_tvm_reads_and_writes_densely() -> None:
    module = planned(lambda self, x: self.conv(x).log_softmax(1).cumsum(2), X)
    foreign = [node for node, _ in region.regions(module) if region.info(node).kind == "other"]
    assert len(foreign) == 2
    assert {strides(value) for node in foreign for value in (node, *region.inputs(node))} == {(144, 36, 6, 1)}


@pytest.mark.parametrize("x", [X, LAST], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.conv(x),
        lambda self, x: self.conv(x).permute(0, 2, 3, 1),
        lambda self, x: (self.conv(x)[:, 1:], x.transpose(1, 2), self.image),
        lambda self, x: self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        lambda self, x: (x + x.relu(), x.mean((2, 3)), x.softmax(1), x.log_softmax(1)),
        lambda self, x: (x.topk(2).values, torch.cat([x, x]), self.conv(x)[:0]),
    ],
)
def test_results_have_the_strides_of_eager(function: Callable[..., Any], x: torch.Tensor) -> None:
    references = torch.utils._pytree.tree_leaves(model(function)(x))
    for node, reference in zip(region.results(planned(function, x)), references, strict=True):
        assert same_strides(reference.shape, strides(node), reference.stride())


def test_a_result_that_comes_twice_is_copied_once() -> None:
    def twice(self: Function, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.conv(x)
        return [y, y, y[:, 1:]]

    module = planned(twice, X)
    first, second, third = region.results(module)
    assert first is second
    assert third is not first
    assert len(copies(module)) == 2


def test_a_constant_among_the_results_is_copied_and_inputs_are_not() -> None:
    module = planned(lambda self, x: (self.image, self.image[1:], x, x[:, 1:]), X)
    kinds = [node.op for node in region.results(module)]
    assert kinds == ["call_module", "call_module", "placeholder", "call_function"]
