"""Kernels whose thread blocks compute together, against PyTorch: whatever the layer, the chain and the tiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import nn

from sepc.ir.element import ElementName
from tests.gpus import agrees, any_tiling, needs_opencl

pytestmark = needs_opencl


class Residual(nn.Module):
    """`inner(x) + x`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def depthwise(channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, dilation * (kernel // 2), dilation, channels)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pointwise": (lambda: pointwise(16, 24), (2, 16, 9, 7)),
    "pointwise, odd channels": (lambda: pointwise(13, 30), (1, 13, 5, 9)),
    "dense, padded": (lambda: nn.Conv2d(12, 20, 3, 1, 1), (1, 12, 11, 10)),
    "dense, stride 2, from 3 channels": (lambda: nn.Conv2d(3, 18, 3, 2, 1), (2, 3, 17, 15)),
    "dense, dilated, not square": (lambda: nn.Conv2d(8, 8, (3, 2), 1, (2, 0), (2, 1)), (1, 8, 10, 9)),
    "pointwise, stride 2": (lambda: nn.Conv2d(16, 16, 1, 2), (1, 16, 9, 9)),
    "linear": (lambda: nn.Linear(50, 37), (5, 50)),
    "one-dimensional": (lambda: nn.Conv1d(16, 24, 5, 2, 2), (2, 16, 41)),
    "depthwise": (lambda: depthwise(24), (2, 24, 9, 10)),
    "depthwise, odd channels, stride 2": (lambda: depthwise(22, 5, 2), (1, 22, 15, 13)),
    "depthwise, dilated": (lambda: depthwise(8, 3, 1, 2), (1, 8, 9, 9)),
    "depthwise, more taps than are unrolled": (lambda: nn.Conv1d(8, 8, 13, 1, 6, groups=8, bias=False), (1, 8, 30)),
}
CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "depthwise, pointwise": (lambda: nn.Sequential(depthwise(20), nn.ReLU6(), pointwise(20, 37)), (1, 20, 9, 11)),
    "pointwise, depthwise": (lambda: nn.Sequential(pointwise(20, 38), nn.SiLU(), depthwise(38, 5, 2)), (2, 20, 9, 11)),
    "inverted residual": (
        lambda: Residual(
            nn.Sequential(pointwise(16, 40), nn.ReLU6(), depthwise(40), nn.Hardswish(), pointwise(40, 16))
        ),
        (2, 16, 9, 9),
    ),
    "inverted residual, stride 2, odd channels": (
        lambda: nn.Sequential(pointwise(10, 42), nn.ReLU6(), depthwise(42, 3, 2), nn.GELU(), pointwise(42, 14)),
        (1, 10, 11, 9),
    ),
    "stem": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), depthwise(16), nn.ReLU(), pointwise(16, 8)),
        (1, 3, 21, 19),
    ),
}


@pytest.mark.parametrize("dtype", get_args(ElementName))
@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_eager_under_any_tiling(
    name: str, dtype: ElementName, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, shape = LAYERS[name]
    with any_tiling(monkeypatch, seed=len(name)):
        agrees(build(), torch.randn(shape), dtype=dtype)


@pytest.mark.parametrize("dtype", get_args(ElementName))
@pytest.mark.parametrize("name", CHAINS)
def test_chains_agree_with_eager_under_any_tiling(
    name: str, dtype: ElementName, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, shape = CHAINS[name]
    for seed in range(2):
        with any_tiling(monkeypatch, seed):
            compiled = agrees(build(), torch.randn(shape), dtype=dtype)
        assert any(region.kind == "chain" for region in compiled.regions)


def test_positions_between_links_that_are_outside_of_the_image_are_zero() -> None:
    # What the first layer would have there is its bias, not 0.
    model = nn.Sequential(pointwise(4, 8), depthwise(8, 3), pointwise(8, 4))
    nn.init.constant_(model[0].bias, 100.0)
    agrees(model, torch.randn(1, 4, 6, 6))
