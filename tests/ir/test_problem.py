"""Problems: what a region is as a loop nest, above all which dimensions become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from sepc.ir import ops, region
from sepc.ir.anchors import UnsupportedRegionError
from sepc.ir.convolution import Convolution
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.problem import Problem, analyse, channels_last_order, contiguous_strides, copy_problem, result_order
from sepc.ir.stage import Map, Normalization, Pooling
from sepc.passes.choose_tiling import region_problem
from tests.helpers import Function, passes_until

X = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
LAST = X.contiguous(memory_format=torch.channels_last)


def problem(function: Callable[..., Any], *inputs: torch.Tensor, kind: str = "convolution", index: int = 0) -> Problem:
    """The problem of region number `index` of that kind."""
    layers = {
        "conv": nn.Conv2d(8, 8, 3, padding=1),
        "point": nn.Conv2d(8, 4, 1),
        "linear": nn.Linear(8, 3),
        "norm": nn.LayerNorm(8),
    }
    module, _ = passes_until("plan-layout", Function(function, **layers), *inputs)
    found = [one for one in region.regions(module) if region.info(one[0]).kind == kind]
    return region_problem(*found[index])


def operand_strides(of: Problem) -> list[tuple[int, ...]]:
    return list(of.operands.values())


def test_a_pointwise_convolution_of_channels_last_is_one_long_row() -> None:
    found = problem(lambda self, x: self.point(x), LAST)
    assert found.stage == Convolution(1, 1, 60, 1, 60, 8, 4)
    assert found.source == (0, 0, 8, 1)
    assert found.result == (0, 0, 4, 1)


def test_a_pointwise_convolution_of_nchw_keeps_the_batch_apart() -> None:
    found = problem(lambda self, x: self.point(x), X)
    assert found.stage == Convolution(1, 2, 30, 2, 30, 8, 4)
    assert found.source == (0, 240, 1, 30)
    assert found.result == (0, 120, 4, 1)


def test_a_gate_per_image_and_channel_keeps_the_batch_apart() -> None:
    found = problem(lambda self, x: self.point(x) * x.mean((2, 3), True)[:, :4], LAST)
    assert found.stage == Convolution(1, 2, 30, 2, 30, 8, 4)
    assert operand_strides(found) == [(0, 8, 0, 1)]


def test_a_residual_of_the_same_layout_does_not_hinder_merging() -> None:
    found = problem(lambda self, x: self.point(x) + x[:, :4], LAST)
    assert found.stage == Convolution(1, 1, 60, 1, 60, 8, 4)
    assert operand_strides(found) == [(0, 0, 8, 1)]


def test_a_slice_of_pixels_keeps_rows_apart() -> None:
    found = problem(lambda self, x: self.point(x[:, :, 1:, :4]), LAST)
    assert found.stage == Convolution(2, 5, 4, 5, 4, 8, 4)
    assert found.source == (240, 40, 8, 1)
    assert found.result == (80, 16, 4, 1)


def test_one_image_of_a_single_channel_bias_is_one_row() -> None:
    found = problem(lambda self, x: self.point(x) + x.mean(1, keepdim=True), LAST)
    assert found.stage == Convolution(1, 1, 60, 1, 60, 8, 4)
    assert operand_strides(found) == [(0, 0, 1, 0)]


def test_an_epilogue_after_a_permute_is_read_along_the_anchors_dimensions() -> None:
    found = problem(
        lambda self, x: functional.gelu(self.linear(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2) + x[:, :3],
        LAST,
        kind="linear",
    )
    assert found.stage == Convolution(1, 1, 60, 1, 60, 8, 3)
    assert operand_strides(found) == [(0, 0, 8, 1)]
    assert found.result == (0, 0, 3, 1)
    assert [str(node.target).split(".")[1] for node in found.epilogue] == ["gelu", "permute", "add"]


def test_a_spatial_convolution_keeps_all_its_dimensions() -> None:
    found = problem(lambda self, x: self.conv(x) + x.relu(), LAST)
    assert found.stage == Convolution(2, 6, 5, 6, 5, 8, 8, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    assert found.source == found.result == (240, 40, 8, 1)


def test_zero_padding_in_front_is_added_to_that_of_the_convolution() -> None:
    found = problem(lambda self, x: self.conv(functional.pad(x, (1, 2, 3, 0))), LAST)
    assert found.stage == Convolution(2, 6, 5, 9, 8, 8, 8, 1, (3, 3), (1, 1), (4, 2), (1, 1))
    assert ops.shape(found.input) == (2, 8, 6, 5)


def test_a_convolution_of_one_dimension_has_one_row() -> None:
    weight = nn.Parameter(torch.randn(4, 8, 3))
    function = Function(lambda self, x: functional.conv1d(x, self.weight, stride=2, padding=1), weight=weight.detach())
    module, _ = passes_until("plan-layout", function, X[:, :, 0])
    ((node, graph), *_) = region.regions(module)
    assert region_problem(node, graph).stage == Convolution(2, 1, 5, 1, 3, 8, 4, 1, (1, 3), (1, 2), (0, 1), (1, 1))


def test_a_layer_norm_sees_pixels_and_channels() -> None:
    found = problem(lambda self, x: self.norm(x.permute(0, 2, 3, 1)), LAST, kind="normalization")
    assert found.stage == Normalization((1, 1, 60, 8), 1e-5)
    assert found.source == found.result == (0, 0, 8, 1)


def test_an_rms_norm_is_one_without_a_mean() -> None:
    found = problem(
        lambda self, x: functional.rms_norm(x.permute(0, 2, 3, 1), (8,), eps=1e-6), LAST, kind="normalization"
    )
    assert found.stage == Normalization((1, 1, 60, 8), 1e-6, subtract_mean=False)


def test_a_group_norm_sees_images_pixels_and_channels() -> None:
    found = problem(lambda self, x: functional.group_norm(x, 2), LAST, kind="normalization")
    assert found.stage == GroupNormalization((2, 30, 8), 2, 1e-5)
    assert found.source == found.result == (240, 8, 1)
    cut = problem(lambda self, x: functional.group_norm(x[:, :, 1:, 1:], 2), LAST, kind="normalization")
    assert cut.stage == GroupNormalization((2, 5, 4, 8), 2, 1e-5)
    with pytest.raises(UnsupportedRegionError, match="no link of a chain"):
        _ = found.link


def test_a_pooling_is_described_by_its_window() -> None:
    found = problem(lambda self, x: functional.max_pool2d(x, (3, 2), (2, 1), (1, 0)), LAST, kind="pooling")
    assert found.stage == Pooling(2, 6, 5, 3, 4, 8, True, False, (3, 2), (2, 1), (1, 0), (1, 1))
    found = problem(lambda self, x: x.mean((2, 3), True), LAST, kind="pooling")
    assert found.stage == Pooling(2, 6, 5, 1, 1, 8, False, adaptive=True)


@pytest.mark.parametrize("x", [X, LAST], ids=["NCHW", "NHWC"])
def test_an_elementwise_region_on_like_tensors_is_one_line(x: torch.Tensor) -> None:
    found = problem(lambda self, x: x.relu() + x, x, kind="elementwise")
    assert found.stage == Map((480,), 2)
    assert found.result == (1,)


def test_a_broadcast_splits_the_line_where_it_must() -> None:
    found = problem(lambda self, x: x * x[:, :, :1, :1], LAST, kind="elementwise")
    assert found.stage == Map((2, 30, 8), 1)
    assert operand_strides(found) == [(240, 8, 1), (240, 0, 1)]
    assert found.result == (240, 8, 1)


def test_a_region_of_one_element_has_one_iteration() -> None:
    found = problem(lambda self, x: x[:1, :1, :1, :1] * 2, LAST, kind="elementwise")
    assert found.stage == Map((1,), 1)
    assert found.result == (1,)


def test_epilogue_cost_counts_the_operators() -> None:
    assert problem(lambda self, x: self.conv(x) + x.mean(1, keepdim=True), LAST).epilogue_cost == 1
    assert problem(lambda self, x: functional.silu(self.conv(x)), LAST).epilogue_cost > 10


# ---- by hand


def by_hand(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """The first region of a function, and the strides of its placeholders."""
    module, _ = passes_until("group", Function(function, linear=nn.Linear(8, 8)), *inputs)
    graph = next(graph for _, graph in region.regions(module))
    return graph, {node: ops.strides(node) for node in region.placeholders(graph)}


def test_tensors_that_advance_too_differently_are_no_loop_nest() -> None:
    x = torch.randn(2, 3, 4, 5, 8)
    graph, strides = by_hand(lambda self, x: self.linear(x), x)
    (node,) = strides
    gaps = {node: (10000, 2000, 300, 10, 1)}
    with pytest.raises(UnsupportedRegionError, match="advance differently"):
        analyse(graph, gaps, x.stride())
    assert analyse(graph, {node: (480, 160, 40, 8, 1)}, x.stride()).stage == Convolution(1, 1, 120, 1, 120, 8, 8)


def test_the_order_of_the_result_follows_the_first_full_operand() -> None:
    graph, strides = by_hand(lambda self, x, y: y[:, :1] * x, X, X)
    gate, full = sorted(strides, key=lambda node: ops.tensor(node).numel())
    last = {gate: (30, 30, 5, 1), full: LAST.stride()}
    assert result_order(graph, last) == (0, 2, 3, 1)
    assert result_order(graph, last | {full: X.stride()}) == (0, 1, 2, 3)
    assert result_order(graph, last | {full: (30, 60, 5, 1)}) == (1, 0, 2, 3)


def test_a_copy_walks_in_the_order_of_its_result() -> None:
    _, strides = by_hand(lambda self, x: x.relu(), X)
    (node,) = strides
    into_last = copy_problem(node, X.stride(), LAST.stride())
    assert into_last.stage == Map((2, 30, 8), 1)
    assert into_last.operands == {node: (240, 1, 30)}
    assert into_last.result == (240, 8, 1)
    plain = copy_problem(node, X.stride(), X.stride())
    assert (plain.stage, plain.operands, plain.result) == (Map((480,), 1), {node: (1,)}, (1,))
    part = copy_problem(node, X.stride(), (480, 30, 5, 1))
    assert (part.stage, part.result) == (Map((2, 240), 1), (480, 1))


def test_strides_of_a_memory_order() -> None:
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1)
    assert contiguous_strides((2, 3, 4, 5), channels_last_order(4)) == (60, 1, 15, 3)
    assert contiguous_strides((2, 0, 4)) == (4, 4, 1)
    assert channels_last_order(3) == (0, 2, 1)
