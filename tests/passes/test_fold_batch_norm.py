"""Batch norm, scales and shifts move into weights wherever that is exact, and the rest is explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx, nn

from sepc.frontend.export import capture
from sepc.ir.ops import aten, shape
from sepc.ir.printer import print_graph
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.fold_batch_norm import FoldBatchNorm
from sepc.passes.manager import PassContext, PassManager

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.randn(2, 8, 7, 7)


def random_statistics(model: nn.Module) -> nn.Module:
    """`model` in eval mode; with fresh statistics a batch norm would be almost the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
            if module.affine:
                nn.init.uniform_(module.weight, -2.0, 2.0)
                nn.init.normal_(module.bias)
    return model.eval()


class Function(nn.Module):
    """A function as a module that owns `layers`."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)
        self.gamma = nn.Parameter(torch.randn(8))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def run(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[str], list[str], fx.GraphModule]:
    """The operators left, and the notes, after folding `model`; each step is verified, and the result against eager."""
    inputs, model = inputs or (X,), random_statistics(model)
    captured = capture(model, inputs)
    module, context = captured.graph_module, PassContext(example_inputs=inputs)
    PassManager([Canonicalize(), FoldBatchNorm()], verify_each=True).run(module, context)
    with torch.no_grad():
        expected, actual = model(*inputs), captured.unflatten(module(*inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not FoldBatchNorm().run(module, PassContext()), "a second run changes nothing"
    names = [str(node.target).split(".")[1] for node in module.graph.nodes if node.op == "call_function"]
    notes = [note.message for note in context.notes if note.pass_name == "fold-batch-norm" and not note.taken]
    return names, notes, module


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (nn.Sequential(nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6)), (2, 8, 9)),
        (nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 8, 7, 7)),
        (nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, groups=4), nn.BatchNorm2d(16, affine=False)), (2, 8, 7, 7)),
        (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, dilation=2), nn.BatchNorm2d(8, eps=0.1)), (2, 8, 7, 7)),
        (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (1, 2, 3, 4, 5)),
        (nn.Sequential(nn.ConvTranspose1d(8, 6, 4, 2, 1), nn.BatchNorm1d(6)), (2, 8, 9)),
        (nn.Sequential(nn.ConvTranspose2d(8, 12, 3, 2, 1, 1, 4, False, 2), nn.BatchNorm2d(12)), (2, 8, 7, 7)),
        (nn.Sequential(nn.ConvTranspose3d(2, 3, 2, 2), nn.BatchNorm3d(3)), (1, 2, 3, 4, 5)),
        (nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), (3, 8)),
        (nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), (2, 8, 7, 7)),
    ],
)
def test_after_a_convolution_or_linear_it_moves_into_the_weights(model: nn.Module, sizes: tuple[int, ...]) -> None:
    names, notes, _ = run(model, torch.randn(sizes))
    assert len(names) == 1
    assert notes == []


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (nn.Sequential(nn.BatchNorm1d(8), nn.Conv1d(8, 6, 3, bias=False)), (2, 8, 9)),
        (nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)), (2, 8, 7, 7)),
        (nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, stride=2, groups=4)), (2, 8, 7, 7)),
        (nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)), (2, 8, 7, 7)),
        (nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 6)), (3, 8)),
        (nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 6), nn.BatchNorm1d(6)), (3, 8)),
    ],
)
def test_before_a_convolution_or_linear_it_moves_into_the_weights(model: nn.Module, sizes: tuple[int, ...]) -> None:
    names, notes, _ = run(model, torch.randn(sizes))
    assert len(names) == 1
    assert notes == []


def test_a_scale_without_a_shift_moves_past_padding() -> None:
    names, _, _ = run(Function(lambda self, x: self.layers[0](x * 3.0), nn.Conv2d(8, 4, 3, padding=1)))
    assert names == ["conv2d"]


def test_chains_of_scales_and_shifts_move_into_the_convolution() -> None:
    def chain(self: Function, x: torch.Tensor) -> torch.Tensor:
        gamma = self.gamma.view(-1, 1, 1)
        return (1 - gamma + self.layers[1](self.layers[0](x) * gamma / 2 - 1)).relu() - gamma

    names, _, _ = run(Function(chain, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    assert names == ["conv2d", "relu", "sub"]


def test_layer_scale_moves_into_a_linear_also_through_a_permute() -> None:
    def mlp(self: Function, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](x.permute(0, 2, 3, 1)) * self.gamma
        y = self.layers[1](hidden.relu()).permute(0, 3, 1, 2)
        return x + y * self.gamma.view(1, -1, 1, 1)

    names, notes, _ = run(Function(mlp, nn.Linear(8, 8), nn.Linear(8, 8)))
    assert names == ["permute", "linear", "relu", "linear", "permute", "add"]
    assert notes == []


@pytest.mark.parametrize(
    ("model", "sizes", "constant_sizes"),
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()), (2, 8, 7, 7), (8, 1, 1)),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.ReLU()), (2, 8, 9), (8, 1)),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.ReLU()), (2, 8), (8,)),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()), (2, 8, 7, 7), (8, 1, 1)),
    ],
)
def test_alone_it_becomes_one_mul_and_one_add(
    model: nn.Module, sizes: tuple[int, ...], constant_sizes: tuple[int, ...]
) -> None:
    names, notes, module = run(model, torch.randn(sizes))
    assert names == ["relu", "mul", "add", "relu"]
    assert all(shape(node) == constant_sizes for node in module.graph.find_nodes(op="get_attr"))
    assert notes == ["relu before it is no convolution or linear; relu_1 after it is no convolution or linear of it"]


def test_weights_shared_by_two_convolutions_stay_apart() -> None:
    def shared(self: Function, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x)) + self.layers[0](x.relu())

    names, _, _ = run(Function(shared, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    assert sorted(names) == ["add", "conv2d", "conv2d", "relu"]


def two_users(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.layers[0](x)
    return self.layers[1](y).relu() + y.relu()


def own_statistics(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.layers[0](x)
    return nn.functional.batch_norm(y, y.mean((0, 2, 3)), y.var((0, 2, 3)))


def computed_weights_before(self: Function, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return self.layers[1](nn.functional.conv2d(x, weight)).relu()


def computed_weights_after(self: Function, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(self.layers[1](x.relu()), weight)


def other_axis(self: Function, x: torch.Tensor) -> torch.Tensor:
    return self.layers[0](x) * self.gamma[:7]


def other_axis_after(self: Function, x: torch.Tensor) -> torch.Tensor:
    return self.layers[0](x * self.gamma[:7])


def two_users_of_the_norm(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.layers[1](x.relu())
    return self.layers[0](y) + y.sum()


WEIGHT = torch.randn(8, 8, 3, 3)


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (two_users, (X,), "conv2d has 2 users"),
        (own_statistics, (X,), "statistics or parameters are computed at run time"),
        (computed_weights_before, (X, WEIGHT), "the weights of conv2d are computed at run time"),
        (computed_weights_after, (X, WEIGHT), "the weights of conv2d are computed at run time"),
        (other_axis, (X,), "varies along dimension 3 of conv2d, whose channels are dimension 1"),
        (other_axis_after, (X,), "varies along dimension 3, and conv2d sums over dimension 1"),
        (lambda self, x: self.layers[0](self.layers[1](x.relu())), (X,), "conv2d pads with zeros after the shift"),
        (lambda self, x: self.layers[1](x.relu()), (X,), "relu before it is no convolution or linear"),
        (
            lambda self, x: torch.conv_transpose2d(self.layers[1](x.relu()), self.layers[0].weight),
            (X,),
            "conv_transpose2d after it is no convolution or linear of it",
        ),
        (lambda self, x: self.layers[1](x).relu(), (X,), "relu after it is no convolution or linear of it"),
        (two_users_of_the_norm, (X,), "it has 2 users"),
        (lambda self, x: self.layers[0](x) * (self.gamma.sum() * 0 + float("inf")), (X,), "is not finite"),
    ],
)
def test_a_rejection_gives_its_reason(
    function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], reason: str
) -> None:
    model = random_statistics(Function(function, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
    module, context = capture(model, inputs).graph_module, PassContext()
    PassManager([Canonicalize(), FoldBatchNorm()]).run(module, context)
    messages = [note.message for note in context.notes]
    assert any(reason in message for message in messages), messages


def test_a_linear_over_three_dimensions_is_not_normalised_along_its_channels() -> None:
    _, notes, _ = run(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(5), nn.ReLU()), torch.randn(2, 5, 8))
    assert "it varies along dimension 1 of linear, whose channels are dimension 2" in notes[0]


def test_folding_rounds_once_from_double_precision() -> None:
    model = random_statistics(nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)))
    conv, norm = model
    _, _, module = run(model)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    (node,) = [node for node in module.graph.nodes if node.target == aten.conv2d.default]
    folded = getattr(module, str(node.args[1].target))
    torch.testing.assert_close(folded, (conv.weight.double() * scale.view(-1, 1, 1, 1)).float(), rtol=2e-7, atol=0)


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    def block(self: Function, x: torch.Tensor) -> torch.Tensor:
        y = self.layers[1](self.layers[0](x)).relu()
        y = self.layers[3](self.layers[2](y))
        return self.layers[4](y + x).relu()

    layers = (
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
    )
    model = random_statistics(Function(block, *layers))
    module = capture(model, (X,)).graph_module
    PassManager([Canonicalize()]).run(module, PassContext())
    before = print_graph(module, sources=False)
    PassManager([FoldBatchNorm()]).run(module, PassContext())
    golden("passes/fold_batch_norm", f"# before\n{before}\n# after\n{print_graph(module, sources=False)}")
