"""The accuracy of transcendental functions in kernels, against float64; see the docstring of the stages' `math`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

import sepc
from tests.helpers import Function

Unary = Callable[[torch.Tensor], torch.Tensor]

# Where the results are normal numbers, and the largest error: relative, and absolute for those that pass through 0 in
# a way that eager PyTorch resolves no better.
RELATIVE: dict[str, tuple[Unary, float, float]] = {
    "exp": (torch.exp, -87.0, 88.0),
    "sigmoid": (torch.sigmoid, -87.0, 90.0),
    "silu": (functional.silu, -85.0, 90.0),
}
ABSOLUTE: dict[str, tuple[Unary, float, float]] = {
    "tanh": (torch.tanh, -20.0, 20.0),
    "erf": (torch.erf, -10.0, 10.0),
    "gelu": (functional.gelu, -20.0, 20.0),
    "gelu_tanh": (lambda x: functional.gelu(x, approximate="tanh"), -20.0, 20.0),
}
LARGEST_ERROR = 1e-6


def as_module(function: Unary) -> torch.nn.Module:
    return Function(lambda self, x: function(x)).eval()


def evaluate(function: Unary, low: float, high: float, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The compiled function and the function in float64 on 2^18 points, with the numbers next to 0 among them."""
    x = torch.linspace(low, high, 1 << 18)
    x[:6] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-8, -1e-8])
    y = sepc.compile(as_module(function), target=target)(x.reshape(1, 16, 128, 128))
    return y.double().flatten(), function(x.double())


@pytest.mark.parametrize("target", ["native", "x86-64-v3"])
@pytest.mark.parametrize("name", RELATIVE)
def test_relative_error_is_at_most_a_millionth(name: str, target: str) -> None:
    actual, expected = evaluate(*RELATIVE[name], target)
    error = (actual - expected).abs() / expected.abs().clamp_min(1e-36)
    assert float(error.max()) <= LARGEST_ERROR


@pytest.mark.parametrize("target", ["native", "x86-64-v3"])
@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_error_is_at_most_a_millionth(name: str, target: str) -> None:
    actual, expected = evaluate(*ABSOLUTE[name], target)
    assert float((actual - expected).abs().max()) <= LARGEST_ERROR


@pytest.mark.parametrize("name", [*RELATIVE, *ABSOLUTE])
def test_every_nan_propagates_whatever_its_payload(name: str) -> None:
    function = {**RELATIVE, **ABSOLUTE}[name][0]
    payloads = torch.tensor([0x7FC00000, -0x400000, 0x7FC00001, 0x7FFFFFFF, -1] * 4, dtype=torch.int32)
    assert sepc.compile(as_module(function))(payloads.view(torch.float32)).isnan().all()
