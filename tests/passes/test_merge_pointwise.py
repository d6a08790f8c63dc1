"""A 1x1 convolution next to another one becomes a part of it where that takes no more work; the rest is explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx, nn

from sepc.frontend.export import capture
from sepc.ir.layers import Conv
from sepc.ir.ops import shape
from sepc.ir.printer import print_graph
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.fold_batch_norm import FoldBatchNorm
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.merge_pointwise import MergePointwise
from tests.helpers import Function

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.randn(2, 8, 7, 7)


def run(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[tuple[int, ...]], list[str], fx.GraphModule]:
    """The shapes of the weights, and the notes, after folding and merging; verified by step, and against eager."""
    inputs, model = inputs or (X,), model.eval()
    captured = capture(model, inputs)
    module, context = captured.graph_module, PassContext(example_inputs=inputs)
    PassManager([Canonicalize(), FoldBatchNorm(), MergePointwise()], verify_each=True).run(module, context)
    with torch.no_grad():
        expected, actual = model(*inputs), captured.unflatten(module(*inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not MergePointwise().run(module, PassContext()), "a second run changes nothing"
    weights = [shape(Conv.of(node).weight) for node in module.graph.nodes if Conv.matches(node)]
    notes = [note.message for note in context.notes if note.pass_name == "merge-pointwise" and not note.taken]
    return weights, notes, module


@pytest.mark.parametrize(
    ("layers", "weight"),
    [
        ((nn.Conv2d(8, 16, 1), nn.Conv2d(16, 6, 1)), (6, 8, 1, 1)),
        ((nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 6, 1, stride=2)), (6, 8, 1, 1)),
        ((nn.Conv2d(8, 16, 1), nn.Conv2d(16, 6, 3, stride=2)), (6, 8, 3, 3)),
        ((nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 6, 3, padding=2, dilation=2)), (6, 8, 3, 3)),
        ((nn.Conv2d(8, 16, (3, 1), (1, 2), (1, 0)), nn.Conv2d(16, 6, 1, bias=False)), (6, 8, 3, 1)),
        ((nn.Conv2d(8, 8, 1, padding=1), nn.Conv2d(8, 8, 1)), (8, 8, 1, 1)),
        ((nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)), (8, 8, 3, 3)),
        ((nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), (8, 8, 3, 3)),
    ],
)
def test_a_chain_becomes_one_convolution(layers: tuple[nn.Module, ...], weight: tuple[int, ...]) -> None:
    assert run(nn.Sequential(*layers))[:2] == ([weight], [])


def test_images_may_have_one_dimension() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 3))
    assert run(model, torch.randn(2, 8, 9))[:2] == ([(8, 8, 3)], [])


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        (nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)),
        (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
        (nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 8, 3)),
        (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, padding=1)),
    ],
)
def test_what_is_no_such_chain_is_left_alone(layers: tuple[nn.Module, ...]) -> None:
    weights, notes, _ = run(nn.Sequential(*layers))
    assert len(weights) == 2
    assert notes == []


def two_users(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.conv(x)
    return self.conv(y) + y


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (two_users, "conv2d has 2 users"),
        (lambda self, x: nn.functional.conv2d(self.conv(x), x[:1, :, :1, :1]), "the weights of conv2d or its own are"),
        (lambda self, x: self.wide(self.narrow(x)), "merged it would take 3136 multiplications instead of 1568"),
        (lambda self, x: self.padded(self.conv(x)), "it pads with zeros after the bias of conv2d"),
    ],
)
def test_a_rejection_gives_its_reason(function: Callable[..., Any], reason: str) -> None:
    layers = {"narrow": nn.Conv2d(8, 2, 1), "wide": nn.Conv2d(2, 8, 1), "conv": nn.Conv2d(8, 8, 1)}
    weights, notes, _ = run(Function(function, **layers, padded=nn.Conv2d(8, 8, 3, padding=1)))
    assert len(weights) == 2
    assert any(reason in note for note in notes), notes


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    module = capture(nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 6, 3)).eval(), (X,)).graph_module
    PassManager([Canonicalize()]).run(module, PassContext())
    before = print_graph(module, sources=False)
    PassManager([MergePointwise()]).run(module, PassContext())
    golden("passes/merge_pointwise", f"# before\n{before}\n# after\n{print_graph(module, sources=False)}")
