"""Models at the edge of what a compiler expects: results that are no computation, odd types, nothing to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import sepc

TOLERANCE = 1e-4
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """A function as a module with a few layers to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def check(model: nn.Module, *inputs: torch.Tensor) -> sepc.CompiledModel:
    """Compile `model` and compare its results for `inputs` with eager, twice: the second call reuses the arena."""
    model = model.eval()
    compiled = sepc.compile(model)
    with torch.no_grad():
        reference = model(*inputs)
    for _ in range(2):
        results = compiled(*inputs)
        expected, structure = pytree.tree_flatten(reference)
        actual, actual_structure = pytree.tree_flatten(results)
        assert actual_structure == structure
        for left, right in zip(actual, expected, strict=True):
            if not isinstance(right, torch.Tensor):
                assert left == right
                continue
            assert (left.shape, left.dtype, left.requires_grad) == (right.shape, right.dtype, False)
            if left.is_floating_point():
                torch.testing.assert_close(left, right, rtol=TOLERANCE, atol=TOLERANCE)
            else:
                assert torch.equal(left, right)
    return compiled


def run(function: Callable[..., Any], *inputs: torch.Tensor) -> sepc.CompiledModel:
    return check(Function(function), *(inputs or (X,)))


def two_views(self: Function, x: torch.Tensor) -> Any:
    y = self.conv(x).relu()
    return y[:, :2], y[:, 2:], y.flatten(2)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(two_views, id="views of one region"),
        pytest.param(lambda self, x: (self.conv(x), x), id="an input"),
        pytest.param(lambda self, x: (self.conv(x), x[:, 1:3].transpose(2, 3)), id="a view of an input"),
        pytest.param(lambda self, x: (self.conv(x), self.table), id="a parameter"),
        pytest.param(lambda self, x: (self.conv(x), self.table[1:], self.table.exp()), id="computed of a parameter"),
        pytest.param(lambda self, x: [self.conv(x)] * 2, id="the same tensor twice"),
        pytest.param(lambda self, x: x, id="only the input"),
        pytest.param(lambda self, x: self.table, id="only a parameter"),
        pytest.param(lambda self, x: {"none": None, "number": 3, "y": x + 1}, id="what is no tensor"),
        pytest.param(lambda self, x: x.expand(3, 2, 4, 6, 6), id="an expanded input"),
        pytest.param(lambda self, x: self.conv(x).mean(), id="a scalar"),
        pytest.param(lambda self, x: self.conv(x)[:, :, :0], id="nothing"),
        pytest.param(lambda self, x: (x[:, :, 6:] + x[:, :, :0].exp(), x[:0, 1:] * self.table[1:]), id="empty sums"),
        pytest.param(lambda self, x: self.conv(x).relu().flip(2)[..., ::2], id="a strided view of a kernel of TVM"),
    ],
)
def test_results_may_be(function: Callable[..., Any]) -> None:
    run(function)


def test_results_that_are_inputs_share_their_memory_as_in_eager() -> None:
    compiled = sepc.compile(Function(lambda self, x: (x, x[:, 1])).eval())
    result, view = compiled(X)
    assert result.data_ptr() == X.data_ptr()
    assert view.data_ptr() == X[:, 1].data_ptr()


def test_a_result_that_is_a_parameter_cannot_be_overwritten_for_the_next_call() -> None:
    model = Function(lambda self, x: (self.conv(x), self.table)).eval()
    compiled = sepc.compile(model)
    compiled(X)[1].zero_()
    assert torch.equal(compiled(X)[1], model.table)


@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_of_none_and_of_one(batch: int) -> None:
    run(lambda self, x: self.conv(x).relu().mean((2, 3)), X[:batch])


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.ConvTranspose2d(4, 3, 9, 9), (2, 4, 5, 5), "81 phases"),
        (nn.Fold((4, 5), (2, 2)), (1, 8, 12), "no stage for aten.col2im"),
        (nn.AdaptiveMaxPool2d(3), (1, 2, 8, 8), "several results"),
    ],
    ids=["many phases", "fold", "adaptive_max_pool2d"],
)
def test_a_layer_without_a_stage_falls_back_to_pytorch(layer: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    compiled = check(layer, torch.randn(shape))
    assert any(reason in region.reason for region in compiled.regions if region.kernel == "torch")


@pytest.mark.parametrize(
    ("function", "other"),
    [
        pytest.param(lambda self, x, m: torch.where(m, x, 0.0), X > 0, id="mask"),
        pytest.param(lambda self, x, m: (x * m, ~m, m & (x > 1)), X > 0, id="logic"),
        pytest.param(lambda self, x, i: (x[:, i], i + 1, i.float() * 2), torch.tensor([2, 0, 1]), id="index"),
        pytest.param(lambda self, x, i: (x.argmax(1) + i, i.to(torch.int64) // 2), torch.arange(6), id="integers"),
        pytest.param(lambda self, x, i: (x.double() * i, (x.half() + x).float(), x > i), torch.arange(6), id="floats"),
    ],
)
def test_tensors_of_other_types_pass_through(function: Callable[..., Any], other: torch.Tensor) -> None:
    run(function, X, other)


def test_an_unused_input_is_ignored() -> None:
    run(lambda self, unused, x: self.conv(x), torch.arange(3), X)


def test_parameters_may_be_shared_by_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.second = nn.Conv2d(4, 4, 3, padding=1)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias
            self.norm.running_mean = torch.randn(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.norm(self.first(x)).relu()) + self.first(x)

    check(Shared(), X)


def test_a_layer_may_be_called_several_times() -> None:
    run(lambda self, x: self.conv(self.conv(self.conv(x))))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_compiling_and_calling_in_any_gradient_mode(mode: Callable[[], Any]) -> None:
    model = Function(lambda self, x: (self.conv(x), x @ (x * 2).mT + 1, x[:, 1:])).eval()
    with mode():
        compiled = sepc.compile(model)
        inside = compiled(X.clone().requires_grad_(mode is torch.enable_grad))
    outside = compiled(X)
    for left, right, expected in zip(inside, outside, model(X), strict=True):
        torch.testing.assert_close(left, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(right, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        assert not left.requires_grad
        assert not right.requires_grad


def test_inputs_that_require_gradients_are_accepted() -> None:
    model = Function(lambda self, x: (self.conv(x), x.relu(), torch.topk(x, 2).values, x)).eval()
    compiled = sepc.compile(model)
    results = compiled(X.clone().requires_grad_())
    assert not any(result.requires_grad for result in results)


def test_inputs_are_never_written() -> None:
    x = X.clone()
    run(lambda self, x: functional.relu(self.conv(x + 1), inplace=True) + x.relu(), x)
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: torch.relu(x).transpose(2, 3) + x, id="elementwise"),
        pytest.param(lambda self, x: (self.conv(x) * x).transpose(2, 3) + x, id="convolution"),
        pytest.param(lambda self, x: (self.conv(x) * self.table).transpose(2, 3) + self.table, id="constant"),
        pytest.param(lambda self, x: (x.exp().permute(0, 2, 3, 1) * 2).permute(0, 3, 1, 2) + x, id="back again"),
        pytest.param(lambda self, x: functional.layer_norm(x[:, :, :5], (6,)), id="rows with gaps"),
        pytest.param(lambda self, x: torch.cat([x[:, :1].expand(2, 4, 6, 6), self.conv(x)], 1), id="expanded"),
    ],
)
def test_a_tensor_may_be_read_in_any_order(function: Callable[..., Any]) -> None:
    run(function)


def test_several_results_of_an_operator_that_tvm_could_lower_are_right() -> None:
    class Extremes(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, indices = torch.relu(x).max(1)
            return values * 2, indices

    model, x = Extremes().eval(), torch.randn(4, 7, 5)
    values, indices = sepc.compile(model)(x)
    expected = model(x)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_attention_with_queries_keys_and_values_in_one_tensor_is_right() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = x.reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            return functional.scaled_dot_product_attention(query, key, value)

    model, x = Attention().eval(), torch.randn(2, 5, 96)
    assert torch.allclose(sepc.compile(model)(x), model(x), atol=1e-5)
