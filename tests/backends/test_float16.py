"""Kernels in float16 agree with eager in float32, under emulation; sums too long for float16 are right all the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final

import pytest
import torch
from torch import nn
from torch.nn import functional

import sepc
from sepc.ir.element import LONGEST_SUM
from tests.bundle.test_emulation import block, needs_tools
from tests.helpers import Function, with_statistics

TARGET: Final = "arm64:cortex-a76"
TOLERANCE: Final = 5e-3
"""Ten roundings to float16, of inputs, weights and results."""


def check(model: nn.Module, *inputs: torch.Tensor, threads: int = 1, kernels: str = "sepc") -> sepc.CompiledModel:
    """Compile `model` in float16 and compare with eager; `kernels` are who computes any of it."""
    model = with_statistics(model)
    compiled = sepc.compile(model, target=TARGET, dtype="float16", num_threads=threads)
    found = torch.utils._pytree.tree_leaves(compiled(*inputs))
    with torch.no_grad():
        for actual, expected in zip(found, torch.utils._pytree.tree_leaves(model(*inputs)), strict=True):
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            assert (actual.float() - expected.float()).abs().max() <= TOLERANCE * expected.float().abs().max()
    assert {one.kernel for one in compiled.regions} == set(kernels.split())
    return compiled


def over(image: torch.Tensor, *layers: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """The layers side by side, behind one that makes the image float16."""

    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        return tuple(layer(y) for layer in layers)

    return Function(forward, layers=nn.ModuleList(layers)), image


@needs_tools
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            lambda: over(
                torch.randn(2, 19, 9, 7),
                nn.Sequential(nn.Conv2d(19, 37, 1), nn.ReLU6()),
                nn.Sequential(nn.Conv2d(19, 24, 3, 2, 1), nn.Hardswish()),
                nn.Sequential(nn.Conv2d(19, 8, 1), nn.GELU()),
                nn.Sequential(nn.Conv2d(19, 8, 1, bias=False), nn.SiLU()),
                nn.ConvTranspose2d(19, 9, 4, 2, 1),
            ),
            id="dense",
        ),
        pytest.param(
            lambda: over(
                torch.randn(1, 32, 9, 11),
                nn.Conv2d(32, 32, 3, padding=1, groups=32),
                nn.Sequential(nn.Conv2d(32, 32, 5, 2, 2, groups=32), nn.Hardsigmoid()),
                nn.Conv2d(32, 64, 3, padding=2, dilation=2, groups=32),
                nn.Conv2d(32, 32, 3, padding=1, groups=8),
                nn.Conv2d(32, 48, 3, padding=1, groups=2),
                nn.ConvTranspose2d(32, 32, 3, 2, 1, groups=32),
            ),
            id="depthwise and grouped",
        ),
        pytest.param(
            lambda: over(
                torch.randn(1, 21, 9, 11),
                *(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((3, 4))),
            ),
            id="pooling",
        ),
        pytest.param(
            lambda: over(
                10 * torch.randn(5, 37) + 30, nn.LayerNorm(37), nn.RMSNorm(37), nn.Sequential(nn.Linear(37, 37))
            ),
            id="norms of rows",
        ),
        pytest.param(
            lambda: over(5 * torch.randn(2, 20, 9, 7) + 30, nn.GroupNorm(5, 20), nn.InstanceNorm2d(20)),
            id="norms of images",
        ),
        pytest.param(
            lambda: (nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.MaxPool3d(2)), torch.randn(1, 4, 5, 6, 7)),
            id="volumes",
        ),
        pytest.param(lambda: over(torch.randn(1, 10, 77), nn.Conv1d(10, 10, 31, groups=10)), id="lines"),
    ],
)
def test_stages_agree_with_eager(case: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    check(*case())


@needs_tools
def test_products_and_softmax_agree_with_eager() -> None:
    def attend(self: Any, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mix(x).view(1, 49, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(query, key, value)

    check(Function(attend, mix=nn.Linear(32, 96)), torch.randn(1, 49, 32))


@needs_tools
def test_elementwise_operators_copies_and_concatenations_agree_with_eager() -> None:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ratio = torch.tanh(x) * y / (1 + y.abs()) + x.exp() - y.sqrt().mul(1e-6)
        joined = torch.cat([self.conv(x), functional.leaky_relu(x)], 1)
        return ratio, joined, x.maximum(y).clamp(-1, 1e5), self.depthwise(x).movedim(1, -1).reshape(-1), torch.erf(x)

    layers = {"conv": nn.Conv2d(13, 8, 1), "depthwise": nn.Conv2d(13, 13, 3, groups=13)}
    check(Function(forward, **layers), torch.randn(1, 13, 6, 7), torch.rand(7) + 0.1)


@needs_tools
def test_what_tvm_lowers_is_between_conversions() -> None:
    model = nn.Sequential(nn.Conv2d(8, 20, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(20, 8, 1))
    check(model, torch.randn(1, 8, 6, 6), kernels="sepc tvm")


@needs_tools
def test_chains_agree_with_eager_on_several_threads() -> None:
    compiled = check(block(24, 96), torch.randn(1, 24, 56, 50), threads=2)
    assert "chain" in {one.kind for one in compiled.regions}


@needs_tools
def test_means_over_rows_are_gathered_in_float32() -> None:
    layers = {"first": nn.Conv2d(16, 96, 1), "second": nn.Conv2d(96, 96, 3, padding=1, groups=96)}

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = functional.silu(self.second(functional.silu(self.first(x))))
        return y * y.mean((2, 3), keepdim=True).sigmoid()

    compiled = check(Function(forward, **layers), torch.randn(1, 16, 56, 56))
    assert any(one.message == "gathers the means of its rows" and one.taken for one in compiled.explain().decisions)


LONG: Final = 3 * LONGEST_SUM


@needs_tools
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param(nn.Linear(16 * LONGEST_SUM, 9), (3, 16 * LONGEST_SUM), id="product"),
        pytest.param(nn.Conv2d(LONG, 9, 2), (1, LONG, 4, 4), id="dense, long pixels"),
        pytest.param(nn.Conv2d(LONGEST_SUM // 4, 9, (3, 7)), (1, LONGEST_SUM // 4, 4, 9), id="dense, columns together"),
        pytest.param(nn.Conv2d(12, 12, (51, 50), groups=12), (1, 12, 51, 53), id="depthwise, rows"),
        pytest.param(nn.Conv1d(16, 16, LONG, groups=16), (1, 16, LONG + 2), id="depthwise, parts of rows"),
        pytest.param(nn.AdaptiveAvgPool2d(1), (1, 9, 60, 60), id="mean"),
    ],
)
def test_sums_do_not_stall(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Of ones, a sum in float16 gets no further than 2048."""
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(shape)
    compiled = sepc.compile(layer.eval(), target=TARGET, dtype="float16", num_threads=1)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=2**-10, atol=0)


@needs_tools
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_a_half_type_takes_and_gives_it(half: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()).to(half)
    kernels = "sepc" if half == torch.float16 else "sepc tvm"
    check(model, torch.randn(1, 16, 9, 9).to(half), kernels=kernels)


@needs_tools
def test_a_network_agrees_with_eager() -> None:
    widths = (16, 24, 40)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish()]
    for before, after in pairwise(widths):
        layers += [block(before, 4 * before), nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10), nn.Softmax(-1)]
    check(nn.Sequential(*layers), torch.randn(2, 3, 64, 48), threads=2)


def compiled_block() -> sepc.CompiledModel:
    return sepc.compile(
        block(32, 96).eval().half(),
        target=TARGET,
        dtype="float16",
        num_threads=1,
        example_inputs=(torch.randn(1, 32, 28, 28).half(),),
    )


def test_multiply_adds_are_of_eight_lanes_and_by_element() -> None:
    compiled = compiled_block()
    code = "\n".join(compiled.source(one, "asm") for one in compiled.regions if one.symbols)
    lines = [line for line in code.splitlines() if "fmla" in line]
    assert any(".8h" in line and ".h[" in line for line in lines)
    assert not [line for line in lines if ".4s" in line]


def test_values_between_kernels_and_weights_take_half_the_memory() -> None:
    model, x = block(32, 96).eval(), torch.randn(1, 32, 28, 28)
    programs = [
        sepc.compile(model, target=TARGET, dtype=dtype, num_threads=1, example_inputs=(x,))._last().executable.program
        for dtype in ("float32", "float16")
    ]
    wide, narrow = (one.constants_bytes for one in programs)
    assert narrow <= 0.52 * wide


def test_the_type_is_told() -> None:
    compiled = compiled_block()
    assert str(compiled.explain()).splitlines()[0].startswith("Sequential compiled for arm64:cortex-a76 in float16")
    assert "operators compute in float16" in str(compiled.explain())
