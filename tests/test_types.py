"""Models and inputs that are not in float32, through `sepc.compile`, against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import sepc
from tests.helpers import Function

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
# Of the largest result. Eager rounds after every operator.
TOLERANCES = {
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    torch.float32: 1e-4,
    torch.float64: 1e-12,
    torch.complex64: 1e-5,
}


class Small(nn.Module):
    """Convolutions with normalisation, residual, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.second(self.first(x))).mean((2, 3)))


def check(model: nn.Module, *inputs: torch.Tensor, tolerance: float | None = None) -> sepc.CompiledModel:
    """Compile `model`; its results must have eager's types and strides, and its values within the type's tolerance."""
    compiled = sepc.compile(model.eval())
    with torch.no_grad():
        expected, structure = pytree.tree_flatten(model(*inputs))
    for _ in range(2):
        actual, found = pytree.tree_flatten(compiled(*inputs))
        assert found == structure
        for left, right in zip(actual, expected, strict=True):
            assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride())
            if right.dtype in TOLERANCES:
                most = (tolerance or TOLERANCES[right.dtype]) * right.abs().max()
                assert (left - right).abs().max() <= most
            else:
                assert torch.equal(left, right)
    return compiled


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_whole_model_in_another_type(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    compiled = check(Small().to(dtype), X.to(dtype).contiguous(memory_format=memory_format))
    kernels = {region.kernel for region in compiled.regions if "conv2d.default" in region.ops or region.kind == "chain"}
    assert kernels == {"torch" if dtype == torch.float64 else "sepc"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_convert_halves_without_pytorch(dtype: torch.dtype) -> None:
    compiled = sepc.compile(Small().eval().to(dtype), fullgraph=True, example_inputs=(X.to(dtype),))
    assert {region.kernel for region in compiled.regions} == {"sepc", "tvm"}
    assert compiled.regions[0].ops == compiled.regions[-1].ops == ("_to_copy.default",)


class Mixed(nn.Module):
    """Layers in three types, with explicit conversions between them, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3).bfloat16(), nn.BatchNorm2d(8)
        self.head, self.table = nn.Linear(8, 3).half(), nn.Embedding(10, 8)

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> Any:
        image = self.norm(self.conv(x.to(torch.bfloat16)).float()).relu().mean((2, 3))
        text = (self.table(words) * mask[..., None]).sum(1)
        return self.head((image + text).half()), image.double(), words + 1, ~mask


def test_types_that_the_model_mixes_itself() -> None:
    words = torch.tensor([[1, 2, 3], [4, 5, 9]])
    check(Mixed(), X, words, words > 2, tolerance=2e-2)


def test_autocast_inside_of_the_model() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(x).relu()

    assert check(Function(forward, conv=nn.Conv2d(4, 8, 3)), X)(X).dtype == torch.bfloat16


def test_autocast_around_a_call_has_no_effect() -> None:
    model = Function(lambda self, x: (self.conv(x), x @ x)).eval()
    model.conv = nn.Conv2d(4, 8, 3)
    compiled = sepc.compile(model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = compiled(X)
    for left, right in zip(inside, compiled(X), strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right)


def test_a_parameter_in_half_is_returned_as_such() -> None:
    model = Function(lambda self, x: (x + 1, self.table, self.table * 2), table=torch.randn(3, 4)).bfloat16()
    assert torch.equal(check(model, X.bfloat16())(X.bfloat16())[1], model.table)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        pytest.param(lambda self, x: torch.fft.fft(x).abs(), X, id="spectrum"),
        pytest.param(lambda self, x: (x * 1j, x.conj(), x.real, x.imag + 1), X + 1j * X.flip(0), id="complex"),
        pytest.param(lambda self, x: x * 2, (X + 1j).conj(), id="conjugated input"),
        pytest.param(lambda self, x: x * 2, (X[:1, :1, :1, :1] + 1j).conj().imag, id="negated input"),
    ],
)
def test_complex_numbers_are_computed_by_pytorch(function: Callable[..., Any], x: torch.Tensor) -> None:
    check(Function(function), x)


def test_a_complex_convolution_is_not_folded() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).to(torch.complex64)
    check(layers, X + 1j * X.flip(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_verification_knows_the_precision_of_halves(dtype: torch.dtype) -> None:
    model = Function(lambda self, x: functional.softmax(self.conv(x), 1), conv=nn.Conv2d(4, 8, 3)).eval().to(dtype)
    compiled = sepc.compile(model, verify_each=True, example_inputs=(X.to(dtype),))
    record = next(one for one in compiled._last().lowered.passes if one.name == "promote")
    assert record.max_difference is not None
    assert 0 < record.max_difference < 16 * torch.finfo(dtype).eps


def test_a_saved_model_in_half_runs_again(tmp_path: Any) -> None:
    compiled = sepc.compile(Small().eval().bfloat16(), example_inputs=(X.bfloat16(),))
    compiled.save(tmp_path / "half.sepc")
    assert torch.equal(sepc.load(tmp_path / "half.sepc")(X.bfloat16()), compiled(X.bfloat16()))
