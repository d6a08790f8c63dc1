"""Parallel linear branches of one input become one convolution, exactly, and whatever stays apart is explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx, nn

from benchmarks import models
from sepc.frontend.export import capture
from sepc.ir.layers import Conv
from sepc.ir.printer import print_graph
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.fold_batch_norm import FoldBatchNorm
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.merge_branches import MergeBranches
from tests.helpers import Function

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.randn(2, 8, 7, 7)
Y = torch.randn(2, 8, 7, 7)


def normalised(channels: int, *sizes: Any, **options: Any) -> nn.Sequential:
    """A convolution of `channels` to as many, and a batch norm that is not the identity."""
    norm = nn.BatchNorm2d(channels)
    for values in (norm.running_mean, norm.weight, norm.bias):
        assert values is not None
        nn.init.normal_(values)
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_var, 0.2, 3.0)
    return nn.Sequential(nn.Conv2d(channels, channels, *sizes, bias=False, **options), norm)


def run(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[str], list[str], fx.GraphModule]:
    """The operators left, and the notes, after merging and folding; verified by step, and the result against eager."""
    inputs, model = inputs or (X,), model.eval()
    captured = capture(model, inputs)
    module, context = captured.graph_module, PassContext(example_inputs=inputs)
    PassManager([Canonicalize(), MergeBranches(), FoldBatchNorm()], verify_each=True).run(module, context)
    with torch.no_grad():
        expected, actual = model(*inputs), captured.unflatten(module(*inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not MergeBranches().run(module, PassContext()), "a second run changes nothing"
    names = [str(node.target).split(".")[1] for node in module.graph.nodes if node.op == "call_function"]
    notes = [note.message for note in context.notes if note.pass_name == "merge-branches" and not note.taken]
    return names, notes, module


def branches(*layers: nn.Module) -> Function:
    """The sum of `layers` of one input."""
    return Function(lambda self, x: sum(layer(x) for layer in self.layers), layers=nn.ModuleList(layers))


def only_convolution(module: fx.GraphModule) -> Conv:
    (convolution,) = [Conv.of(node) for node in module.graph.nodes if Conv.matches(node)]
    return convolution


@pytest.mark.parametrize(
    ("layers", "kernel", "groups"),
    [
        ((nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Identity()), (3, 3), 1),
        ((nn.Identity(), nn.Conv2d(8, 8, 1, bias=False)), (1, 1), 1),
        ((nn.Conv2d(8, 8, 1, groups=8), nn.Identity(), nn.Conv2d(8, 8, 5, padding=2, groups=8)), (5, 5), 8),
        ((nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, 1, 2)), (3, 3), 1),
        ((nn.Conv2d(8, 16, 3, 2, 1, groups=8), nn.Conv2d(8, 16, 1, 2, groups=8)), (3, 3), 8),
        ((nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)), (3, 3), 1),
        ((nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Identity()), (3, 3), 1),
        ((nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.Conv2d(8, 16, 3, padding=1, groups=4)), (3, 3), 2),
        (
            (
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
                nn.Conv2d(8, 8, (3, 1), 1, (1, 0)),
            ),
            (3, 3),
            1,
        ),
        ((nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=2, dilation=2)), (5, 5), 1),
        ((nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 1), nn.Identity()), (3, 3), 1),
        ((nn.Conv2d(8, 8, 4, padding=1), nn.Conv2d(8, 8, 2)), (4, 4), 1),
        ((normalised(8, 3, padding=1), normalised(8, 1), nn.Identity()), (3, 3), 1),
        ((normalised(8, 3, padding=1, groups=8), normalised(8, 1, groups=8), normalised(8, 1)[1]), (3, 3), 8),
    ],
)
def test_branches_of_one_input_become_the_largest_of_them(
    layers: tuple[nn.Module, ...], kernel: tuple[int, ...], groups: int
) -> None:
    names, notes, module = run(branches(*layers))
    assert names == ["conv2d"]
    assert (only_convolution(module).kernel, only_convolution(module).groups) == (kernel, groups)
    assert notes == []


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ((nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 1), nn.Identity()), (2, 8, 9)),
        ((nn.Conv1d(8, 8, 5, padding=2, groups=8), nn.Identity()), (2, 8, 9)),
        ((nn.Conv3d(2, 2, 3, padding=1), nn.Conv3d(2, 2, 1), nn.Identity()), (1, 2, 3, 4, 5)),
        ((nn.Conv2d(1, 1, 3, padding=1), nn.Identity()), (2, 1, 5, 5)),
        ((nn.Conv2d(8, 8, 3, padding=1), nn.Identity()), (1, 8, 1, 1)),
    ],
)
def test_images_may_have_any_rank_and_size(layers: tuple[nn.Module, ...], sizes: tuple[int, ...]) -> None:
    names, notes, _ = run(branches(*layers), torch.randn(sizes))
    assert len(names) == 1
    assert notes == []


def test_weights_may_be_channels_last() -> None:
    model = branches(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    names, notes, _ = run(model.to(memory_format=torch.channels_last))
    assert names == ["conv2d"]
    assert notes == []


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: torch.sub(self.conv(x), self.small(x), alpha=3) + x,
        lambda self, x: torch.add(self.conv(x), torch.add(self.small(x), x, alpha=-2), alpha=0.5),
        lambda self, x: x - (self.small(x) - (self.conv(x) - 2.0 * x)),
        lambda self, x: (self.conv(x) * self.gamma + x / 2) * 3 - 1,
        lambda self, x: self.norm(self.conv(x) + self.small(x) + x),
        lambda self, x: self.norm(self.conv(x) + x) + self.small(x) + x,
        lambda self, x: (self.conv(x) + self.gamma) + (self.small(x) + 1.5),
    ],
)
def test_numbers_scales_shifts_and_norms_are_part_of_it(function: Callable[..., Any]) -> None:
    layers = {"conv": nn.Conv2d(8, 8, 3, padding=1), "small": nn.Conv2d(8, 8, 1), "norm": normalised(8, 1)[1]}
    names, notes, _ = run(Function(function, **layers, gamma=torch.randn(8, 1, 1)))
    assert names == ["conv2d"]
    assert notes == []


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda self, x, y: (y + self.conv(x)) + self.small(x), ["conv2d", "add"]),
        (lambda self, x, y: self.conv(x) - (y - x), ["conv2d", "add"]),
        (lambda self, x, y: self.conv(x) + x + self.conv(y) + y, ["conv2d", "conv2d", "add"]),
        (lambda self, x, y: self.conv(x) + x + self.small(y.relu()), ["relu", "conv2d", "conv2d", "add"]),
        (lambda self, x, y: self.conv(self.small(x)) + self.small(x), ["conv2d", "conv2d", "conv2d", "add"]),
    ],
)
def test_terms_of_something_else_stay_in_the_sum(function: Callable[..., Any], names: list[str]) -> None:
    layers = {"conv": nn.Conv2d(8, 8, 3, padding=1), "small": nn.Conv2d(8, 8, 1)}
    found, notes, _ = run(Function(function, **layers), X, Y)
    assert sorted(found) == sorted(names)
    assert notes == []


def test_a_convolution_that_another_branch_reads_is_its_input() -> None:
    def block(self: Function, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y) + y + self.third(x)

    layers = {name: nn.Conv2d(8, 8, 3, padding=1) for name in ("first", "second", "third")}
    names, _, _ = run(Function(block, **layers))
    assert names == ["conv2d", "conv2d", "conv2d", "add"]


def test_what_does_not_fit_the_largest_may_fit_the_next() -> None:
    layers = (nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2))
    names, _, _ = run(branches(*layers, nn.Conv2d(8, 8, (1, 3), padding=(0, 2), dilation=2)))
    assert names == ["conv2d", "conv2d", "add"]


def three_and_two_groups(self: Function, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    part = x[:, :6]
    return self.three_groups(part) + self.two_groups(part)


def strided(self: Function, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    pixel = x[:, :, :1, :1]
    return self.strided(pixel) + pixel


def computed_weights(self: Function, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(x, y[0, :, :1, :1, None].expand(8, 1, 1, 8).transpose(1, 3)) + x


def conv_used_twice(self: Function, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = self.conv(x)
    return (z + self.small(x)) * z.relu()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x, y: self.row(x) + self.column(x), "its kernel of 3x1 has taps that conv2d has not"),
        (lambda self, x, y: self.conv(x) + self.dilated(x), "its kernel of 3x3 has taps that conv2d has not"),
        (lambda self, x, y: self.dilated(x) + self.between(x), "its kernel of 2x2 has taps that conv2d has not"),
        (lambda self, x, y: self.depthwise(x) + self.row(x), "its kernel of 3x3 has taps that conv2d_1 has not"),
        (lambda self, x, y: self.depthwise(x) + self.small(x), "its groups, 1, do not lie in those of conv2d, 8"),
        (lambda self, x, y: self.grouped(x) + self.column(x), "its groups, 1, do not lie in those of conv2d, 2"),
        (three_and_two_groups, "its groups, 3, do not lie in those of conv2d_1, 2"),
        (strided, "stride [1, 1] is not [2, 2], that of conv2d"),
        (conv_used_twice, "conv2d has 2 users"),
        (computed_weights, "the weights of conv2d are computed at run time"),
        (lambda self, x, y: self.conv(x) * self.gamma + x, "it varies along dimension 3, and channels are dimension 1"),
        (lambda self, x, y: self.conv(x) * float("inf") + x, "its scale or shift is not finite"),
    ],
)
def test_a_rejection_gives_its_reason(function: Callable[..., Any], reason: str) -> None:
    layers = {
        "conv": nn.Conv2d(8, 8, 3, padding=1),
        "small": nn.Conv2d(8, 8, 1),
        "row": nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        "column": nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
        "dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        "between": nn.Conv2d(8, 8, 2, padding=1, dilation=2),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=2),
        "three_groups": nn.Conv2d(6, 6, 1, groups=3),
        "two_groups": nn.Conv2d(6, 6, 1, groups=2),
        "strided": nn.Conv2d(8, 8, 3, padding=1, stride=2),
    }
    model = Function(function, **layers, gamma=torch.randn(7))
    module, context = capture(model.eval(), (X, Y)).graph_module, PassContext()
    PassManager([Canonicalize(), MergeBranches()]).run(module, context)
    messages = [note.message for note in context.notes if note.pass_name == "merge-branches"]
    assert any(reason in message for message in messages), messages


@pytest.mark.parametrize("function", [lambda self, x: x + x.relu(), lambda self, x: x + x * 2, lambda self, x: x + x])
def test_a_sum_without_a_convolution_is_left_alone(function: Callable[..., Any]) -> None:
    names, notes, _ = run(Function(function))
    assert "add" in names
    assert notes == []


def test_merging_rounds_once_from_double_precision() -> None:
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    _, _, module = run(Function(lambda self, x: self.first(x) * 0.3 - self.second(x), first=first, second=second))
    merged = getattr(module, str(only_convolution(module).weight.target))
    expected = first.weight.double() * 0.3 - second.weight.double()
    torch.testing.assert_close(merged, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["repvit_m1_1", "mobileone_s1", "repvgg_a0"])
def test_a_model_is_left_with_the_convolutions_of_the_reparametrised_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_REPARAMETRISED", ())
    model, inputs = models.load(name, size=64)
    _, notes, module = run(model, *inputs)
    reference = models._reparametrised(model)
    wanted = sorted(tuple(one.weight.shape) for one in reference.modules() if isinstance(one, nn.Conv2d))
    found = sorted(
        (getattr(module, str(Conv.of(one).weight.target)) for one in module.graph.nodes if Conv.matches(one)),
        key=lambda weight: tuple(weight.shape),
    )
    assert [tuple(weight.shape) for weight in found] == wanted
    assert notes == []


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    def block(self: Function, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x) + self.small(x) + x) - y + self.norm(y)

    layers = {"conv": normalised(8, 3, padding=1, groups=8), "small": nn.Conv2d(8, 8, 1, groups=8)}
    model = Function(block, **layers, norm=normalised(8, 1)[1])
    module = capture(model.eval(), (X, Y)).graph_module
    PassManager([Canonicalize()]).run(module, PassContext())
    before = print_graph(module, sources=False)
    PassManager([MergeBranches()]).run(module, PassContext())
    golden("passes/merge_branches", f"# before\n{before}\n# after\n{print_graph(module, sources=False)}")
