"""Group: which operators share a kernel, and the reason where an operator gets none of ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import sepc
from sepc.frontend.export import capture
from sepc.ir import ops, region
from sepc.ir.printer import print_graph
from sepc.passes.group import classify
from tests.helpers import Function, passes_until

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def layers() -> dict[str, nn.Module | torch.Tensor]:
    return {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "point": nn.Conv2d(4, 4, 1),
        "linear": nn.Linear(4, 4),
        "norm": nn.LayerNorm(4),
        "scale": torch.randn(4),
        "image": torch.randn(4, 6, 6),
        "rows": torch.randn(3, 4),
    }


def grouped(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    return passes_until("group", Function(function, **layers()), *(inputs or (X,)))[0]


def contents(module: fx.GraphModule) -> list[list[str]]:
    """The operators in each region, without overload names."""
    return [
        [str(node.target).split(".")[1] for node in region.computations(graph)] for _, graph in region.regions(module)
    ]


# ---- epilogues


def doubled(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.conv(x)
    return y + y


def gated(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.conv(x)
    return y * y.sigmoid()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda self, x: self.conv(x).relu() + x, [["conv2d", "relu", "add"]], id="activation, residual"),
        pytest.param(lambda self, x: functional.gelu(self.linear(x[..., :4])), [["linear", "gelu"]], id="linear"),
        pytest.param(lambda self, x: functional.max_pool2d(x, 2) * 2, [["max_pool2d", "mul"]], id="pooling"),
        pytest.param(lambda self, x: self.norm(x[..., :4]).relu(), [["layer_norm", "relu"]], id="layer norm"),
        pytest.param(lambda self, x: x.mean((2, 3), True).sigmoid() * 2, [["mean", "sigmoid", "mul"]], id="mean"),
        pytest.param(lambda self, x: (x * 2).relu() + x, [["mul", "relu", "add"]], id="elementwise alone"),
        pytest.param(doubled, [["conv2d", "add"]], id="added to itself"),
        pytest.param(
            lambda self, x: functional.silu(x[:, :1]) + self.conv(x).relu().mean((2, 3), True),
            [["silu"], ["conv2d", "relu"], ["mean"], ["add"]],
            id="the sum is larger than each summand",
        ),
        pytest.param(
            gated,
            [["conv2d"], ["sigmoid", "mul"]],
            id="two users",
        ),
        pytest.param(
            lambda self, x: self.conv(x).relu().double() * 2,
            [["conv2d", "relu"], ["_to_copy"], ["mul"]],
            id="another type",
        ),
        pytest.param(
            lambda self, x: torch.cat([self.conv(x), x], 1).relu(),
            [["conv2d"], ["cat"], ["relu"]],
            id="a concatenation takes nothing along",
        ),
        pytest.param(
            lambda self, x: (self.conv(x)[:, :2] + 1, self.point(x)),
            [["conv2d"], ["add"], ["conv2d"]],
            id="a view ends the chain",
        ),
    ],
)
def test_a_region_takes_along(function: Callable[..., Any], expected: list[list[str]]) -> None:
    assert contents(grouped(function)) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(
            lambda self, x: functional.gelu(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x,
            [["conv2d", "permute", "gelu", "permute", "add"]],
            id="there and back",
        ),
        pytest.param(
            lambda self, x: self.linear(self.conv(x).permute(0, 2, 3, 1)), [["conv2d"], ["linear"]], id="permute last"
        ),
        pytest.param(
            lambda self, x: x.relu().transpose(2, 3) + x, [["relu"], ["add"]], id="an operand of before the permute"
        ),
        pytest.param(
            lambda self, x: (self.conv(x) * self.image).transpose(2, 3) + self.image,
            [["conv2d", "mul"], ["add"]],
            id="a constant of before the permute",
        ),
        pytest.param(
            lambda self, x: self.conv(x).transpose(2, 3) + x,
            [["conv2d", "permute", "add"]],
            id="the anchor's own input",
        ),
    ],
)
def test_a_permute_joins_only_between_what_can_be_read_in_one_order(
    function: Callable[..., Any], expected: list[list[str]]
) -> None:
    assert contents(grouped(function)) == expected


# ---- padding


def padded(*amounts: int, value: float = 0.0, mode: str = "constant") -> Callable[..., Any]:
    return lambda self, x: self.conv(functional.pad(x, amounts, mode, value)).relu()


def padded_for_two(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = functional.pad(x, (0, 1))
    return self.conv(y), y


@pytest.mark.parametrize("amounts", [(0, 1, 0, 1), (2, 0, 0, 0), (1, 2, 3, 4)])
def test_asymmetric_zero_padding_joins_the_convolution(amounts: tuple[int, ...]) -> None:
    assert contents(grouped(padded(*amounts))) == [["constant_pad_nd", "conv2d", "relu"]]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(padded(0, 1, 0, 1, value=2.0), id="not of zeros"),
        pytest.param(padded(-1, 1, 0, 1), id="cropping"),
        pytest.param(lambda self, x: self.conv(functional.pad(x[:, :3], (0, 0, 0, 0, 0, 1))), id="of channels"),
        pytest.param(lambda self, x: self.conv(functional.pad(x[:1], (0, 1, 0, 0, 0, 0, 0, 1))), id="of the batch"),
        pytest.param(padded_for_two, id="used twice"),
        pytest.param(lambda self, x: functional.pad(x, (0, 1)).relu(), id="no convolution"),
        pytest.param(
            lambda self, x: functional.conv2d(x, functional.pad(self.conv.weight * x.mean(), (0, 1))), id="of weights"
        ),
        pytest.param(
            lambda self, x: functional.conv2d(functional.pad(x, (0, 1)), self.conv.weight * x.mean()),
            id="before a convolution without kernel",
        ),
    ],
)
def test_other_padding_stays_outside_of_the_convolution(function: Callable[..., Any]) -> None:
    assert ["constant_pad_nd"] in contents(grouped(function))


def test_convolutions_that_pad_asymmetrically_are_right() -> None:
    pads = [(0, 1, 0, 1), (2, 0, 1, 0), (1, 2, 3, 0), (7, 0, 0, 7)]
    model = Function(
        lambda self, x: [self.depth(self.conv(functional.pad(x, pad))) for pad in pads],
        conv=nn.Conv2d(4, 8, 3, 2),
        depth=nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(8, 8, (2, 3), groups=8)),
    ).eval()
    compiled = sepc.compile(model)
    for result, reference in zip(compiled(X), model(X), strict=True):
        torch.testing.assert_close(result, reference.detach(), rtol=1e-4, atol=1e-4)
    assert {one.ops[0] for one in compiled.regions if one.kind != "copy"} == {"constant_pad_nd.default"}
    assert {one.kernel for one in compiled.regions} == {"sepc"}


# ---- reasons


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: functional.conv2d(x, self.conv.weight * x.mean()), "conv2d.* whose weight is computed"),
        (lambda self, x: functional.conv2d(x, self.conv.weight, x[0, :, 0, 0]), "conv2d.* whose weight is computed"),
        (lambda self, x: self.conv(x[0]), "conv2d.* without a batch dimension"),
        (
            lambda self, x: torch.conv_transpose2d(x, self.conv.weight * x.mean()),
            "conv_transpose2d.* whose weight is computed",
        ),
        (
            lambda self, x: torch.conv_transpose2d(x, self.conv.weight, stride=9),
            "conv_transpose2d.* of 81 phases, more than 64",
        ),
        (lambda self, x: functional.linear(x, x[0, 0]), "linear.* whose weight is computed"),
        (lambda self, x: self.linear(x[0, 0, 0, :4]), "linear.* without a batch dimension"),
        (lambda self, x: functional.layer_norm(x, (6,), x[0, 0, 0]), "layer_norm.* whose weight is computed"),
        (lambda self, x: functional.layer_norm(x, (6, 6)), "layer_norm.* over more than the last dimension"),
        (lambda self, x: functional.rms_norm(x, (6,), x[0, 0, 0]), "rms_norm.* whose weight is computed"),
        (lambda self, x: functional.rms_norm(x, (6, 6)), "rms_norm.* over more than the last dimension"),
        (lambda self, x: functional.group_norm(x, 2, x[0, :, 0, 0]), "group_norm.* whose weight is computed"),
        (lambda self, x: functional.group_norm(x[:, :, 0, 0], 2), "group_norm.* of a tensor with 2 dimensions"),
        (
            lambda self, x: functional.instance_norm(x, self.rows[0, :4], self.rows[0, :4], use_input_stats=False),
            "instance_norm.* with running statistics",
        ),
        (lambda self, x: functional.avg_pool2d(x[0], 2), "avg_pool2d.* without a batch dimension"),
        (lambda self, x: functional.adaptive_avg_pool2d(x[0], 2), "adaptive_avg_pool2d.* without a batch dimension"),
        (lambda self, x: x + self.linear(self.rows).sum(), "linear.* of a constant"),
        (lambda self, x: x.mean(1), r"mean.* over dimensions \(1,\) of 4"),
        (lambda self, x: x.mean((2, 3)), r"mean.* over dimensions \(2, 3\) of 4"),
        (lambda self, x: x.softmax(1), "softmax.* over dimension 1 of 4"),
        (lambda self, x: x[0, 0] @ x[0, 0, 0], "matmul.* with a vector"),
        (lambda self, x: x.topk(2).values, "topk.* has several results"),
        (lambda self, x: torch.cat([x.long(), x.long()]), "cat.* on torch.int64: our stages compute in float32"),
        (lambda self, x: functional.max_pool2d(x.double(), 2), "on torch.float64: our stages compute in float32"),
        (lambda self, x: x.long() + 1, "no stage for aten.add.Tensor"),
        (lambda self, x: self.conv(x[:0]), "conv2d.* on an empty tensor"),
        (lambda self, x: x[:, :, 6:].relu(), "relu.* on an empty tensor"),
        (lambda self, x: torch.cat([x, x[:0]]), "cat.* on an empty tensor"),
    ],
)
def test_an_operator_without_a_stage_says_why(function: Callable[..., Any], reason: str) -> None:
    module = capture(Function(function, **layers()).eval(), (X,)).graph_module
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    infos = [classify(node) for node in calls]
    found = [info for info in infos if info.reason]
    assert all((info.kind, info.kernel) == ("other", "torch") for info in found)
    assert any(re.search(reason, info.reason) for info in found)


def test_the_reason_is_in_the_region_and_in_the_notes() -> None:
    module, context = passes_until("group", Function(lambda self, x: x.softmax(0)), X[0, 0, 0])
    ((node, _),) = region.regions(module)
    reason = "aten.softmax.int over dimension 0 of 1"
    assert region.info(node) == region.RegionInfo("other", "torch", reason)
    assert [note.message for note in context.notes if note.pass_name == "group"] == [reason]


def test_views_and_getitems_stay_outside() -> None:
    module = grouped(lambda self, x: (x.topk(2).indices, self.conv(x).flatten(1), x[:, 1:]))
    outside = [node for node in module.graph.nodes if node.op == "call_function"]
    assert [str(node.target).split(".")[0] for node in outside if not ops.is_op(node)] == [
        "<built-in function getitem>",
        "aten",
        "aten",
    ]
    assert contents(module) == [["topk"], ["conv2d"]]


def test_a_graph_without_computation_is_left_alone() -> None:
    module = grouped(lambda self, x: (x, x[:, 1:]))
    assert not list(region.regions(module))


# ---- a whole block


class Block(nn.Module):
    """An inverted residual with squeeze and excitation, then a ConvNeXt block."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.depth = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.squeeze, self.excite = nn.Conv2d(2 * channels, 2, 1), nn.Conv2d(2, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)
        self.large = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.layer_norm = nn.LayerNorm(channels)
        self.first, self.second = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.randn(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu6(self.depth(functional.silu(self.norm(self.expand(x)))))
        gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(y, 1)))).sigmoid()
        x = x + self.project(y * gate)
        y = self.layer_norm(self.large(x).permute(0, 2, 3, 1))
        y = self.scale * self.second(functional.gelu(self.first(y)))
        return x + y.permute(0, 3, 1, 2)


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    before, _ = passes_until("fold-batch-norm", Block(), X)
    after, _ = passes_until("group", Block(), X)
    texts = [print_graph(module, sources=False) for module in (before, after)]
    golden("passes/group", "# before\n{}\n# after\n{}".format(*texts))
