"""Products of two tensors and softmax, alone and as attention, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

import sepc
from tests.helpers import Function

TOLERANCE = 1e-4


def check(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, threads: int = 2, **state: object) -> list[str]:
    """Compile, compare with eager; the kinds of the regions, all of which must be kernels of ours."""
    model = Function(function, **state).eval()
    compiled = sepc.compile(model, example_inputs=inputs, num_threads=threads)
    with torch.no_grad():
        reference, result = model(*inputs), compiled(*inputs)
    assert result.shape == reference.shape
    assert (result - reference).abs().max() <= TOLERANCE * reference.abs().max()
    assert {(region.kernel, region.reason) for region in compiled.regions} == {("sepc", "")}
    return [region.kind for region in compiled.regions]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((5, 7), (7, 3)),
        ((3, 17, 33), (3, 33, 70)),
        ((2, 3, 50, 16), (2, 3, 16, 49)),
        ((2, 3, 4, 9, 5), (2, 3, 4, 5, 6)),
        ((1, 1, 1), (1, 1, 1)),
        ((4, 1, 9), (4, 9, 1)),
        ((2, 3, 4, 9), (9, 20)),
        ((9, 20), (2, 3, 20, 5)),
        ((2, 1, 4, 9), (1, 3, 9, 20)),
    ],
)
def test_products_of_all_shapes(left: Sequence[int], right: Sequence[int]) -> None:
    assert check(lambda self, a, b: a @ b, random(*left), random(*right)) == ["product"]


def test_the_right_factor_is_copied_where_its_rows_are_not_dense() -> None:
    a, b = random(2, 3, 20, 16), random(2, 3, 40, 16)
    assert check(lambda self, a, b: a @ b.transpose(-2, -1), a, b) == ["copy", "product"]
    assert check(lambda self, a, b: a.transpose(-2, -1) @ b, random(2, 3, 16, 20), random(2, 3, 16, 40)) == ["product"]


def test_a_value_is_multiplied_with_itself() -> None:
    assert check(lambda self, x: x.transpose(1, 2) @ x + x, random(2, 8, 8))[-1] == "product"
    assert check(lambda self, x: x @ x, random(2, 9, 9)) == ["product"]


def test_one_factor_may_be_a_constant() -> None:
    assert check(lambda self, x: self.weight @ x, random(2, 9, 20), weight=random(5, 9)) == ["product"]
    assert check(lambda self, x: x @ self.weight, random(2, 9, 20), weight=random(20, 3)) == ["product"]


def test_an_epilogue_follows_a_product() -> None:
    def biased(self: Function, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.relu((a @ b) * 0.25 + self.bias).permute(0, 2, 1, 3).contiguous()

    assert check(biased, random(2, 3, 20, 9), random(2, 3, 9, 31), bias=random(3, 20, 31)) == ["product"]


def test_spellings_of_einsum_and_bmm() -> None:
    a, b = random(6, 10, 9), random(6, 9, 31)
    assert check(lambda self, a, b: torch.bmm(a, b), a, b) == ["product"]
    assert "product" in check(lambda self, a, b: torch.einsum("bmk,bkn->bmn", a, b), a, b)


def test_factors_that_advance_along_too_many_dimensions_go_to_pytorch() -> None:
    model = Function(lambda self, a, b: a.relu().transpose(0, 1) @ b.relu()).eval()
    inputs = (random(2, 3, 4, 9, 5), random(3, 1, 4, 5, 6))
    compiled = sepc.compile(model, example_inputs=inputs)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
    assert any("advance differently along too many dimensions" in region.reason for region in compiled.regions)


# ---- softmax


@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (2, 3, 16), (2, 3, 7, 49), (4, 197), (2, 300), (1, 1000)])
def test_softmax_of_all_widths(shape: Sequence[int]) -> None:
    assert check(lambda self, x: (x * 5).softmax(-1), random(*shape))[-1] == "normalization"


def test_softmax_of_large_values_and_of_masks() -> None:
    x = random(4, 50) * 100
    x[:, 7:30] = float("-inf")
    check(lambda self, x: x.softmax(-1), x)
    check(lambda self, x: x.softmax(-1), random(3, 20) + 1e4)


def test_softmax_of_what_is_no_number_is_none() -> None:
    x = random(4, 50)
    x[0, 3], x[1, 48], x[2] = float("nan"), float("inf"), float("-inf")
    model = Function(lambda self, x: x.softmax(-1)).eval()
    result = sepc.compile(model)(x)
    assert torch.equal(result.isnan(), model(x).isnan())
    torch.testing.assert_close(result[3], model(x)[3])


def test_rows_may_lie_anywhere() -> None:
    x = random(2, 3, 4, 5, 6, 20)
    assert check(lambda self, x: x.permute(4, 0, 3, 2, 1, 5).softmax(-1), x) == ["normalization"]
    assert check(lambda self, x: x.permute(0, 2, 1, 3, 4, 5).softmax(-1) * 2, x) == ["normalization"]
    assert check(lambda self, x: x[:, :, :, 1:, :3].softmax(-1), x) == ["normalization"]
    norm = nn.LayerNorm(20, elementwise_affine=False)
    assert check(lambda self, x: self.norm(x.permute(1, 3, 0, 2, 4, 5)), x, norm=norm) == ["normalization"]


def test_softmax_over_few_elements_of_another_dimension_is_no_stage_of_ours() -> None:
    x = random(2, 6, 5)
    compiled = sepc.compile(Function(lambda self, x: x.softmax(1)).eval(), example_inputs=(x,))
    torch.testing.assert_close(compiled(x), x.softmax(1))
    assert [region.kernel for region in compiled.regions] == ["tvm"]


# ---- attention


class Attention(nn.Module):
    """Self-attention over tokens, as vision transformers have it."""

    def __init__(self, channels: int, heads: int, mask: torch.Tensor | None = None) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.heads, self.mask = heads, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, channels = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*parts.unbind(0), attn_mask=self.mask)
        result: torch.Tensor = self.project(y.transpose(1, 2).reshape(batch, tokens, channels))
        return result


@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "heads", "masked"),
    [(1, 50, 32, 4, False), (2, 49, 48, 3, True), (3, 7, 20, 5, False), (1, 1, 16, 1, False)],
)
def test_attention_is_compiled_throughout(batch: int, tokens: int, channels: int, heads: int, masked: bool) -> None:
    mask = random(heads, tokens, tokens) if masked else None
    model = Attention(channels, heads, mask).eval()
    x = random(batch, tokens, channels)
    compiled = sepc.compile(model, example_inputs=(x,))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert {region.kernel for region in compiled.regions} == {"sepc"}
    # Only the keys are moved.
    assert [region.kind for region in compiled.regions].count("copy") <= 1
