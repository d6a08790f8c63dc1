"""Chains of stages in one kernel, against PyTorch: whatever the composition, the window and the task size."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import sepc
from sepc.cost_model import planner
from sepc.cost_model.chain import choose_chain
from sepc.cost_model.search import Choice
from sepc.cost_model.tiling import ChainTiling
from sepc.passes import fuse

TOLERANCE = 1e-4
ACTIVATIONS = (nn.ReLU6, nn.SiLU, nn.Identity)


class Residual(nn.Module):
    """`inner(x) + x`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x


class ConvNextBlock(nn.Module):
    """Depthwise, layer norm over channels, linear, GELU, linear, scale, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = depthwise(channels, 7)
        self.norm = nn.LayerNorm(channels)
        self.first, self.second = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.second(nn.functional.gelu(self.first(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class MetaFormerBlock(nn.Module):
    """Layer norm over channels, two 1×1 convolutions with an activation between, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.first, self.second = pointwise(channels, 2 * channels), pointwise(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.second(self.first(y).relu().square()) + x


class Excited(nn.Module):
    """Depthwise, a factor per channel from its global average, and a 1×1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.project = depthwise(channels), pointwise(channels, 12)
        self.excite = pointwise(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x).relu()
        factor = self.excite(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.project(y * factor)


class OverLastDimension(nn.Module):
    """`inner` of an image whose channels are its last dimension."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.permute(0, 2, 3, 1))


@pytest.fixture
def always_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest chains win, whatever they cost."""
    monkeypatch.setattr(fuse, "piece_time_us", lambda links, planner, objective: 1.0)


@pytest.fixture
def any_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and tasks of any size are chosen."""
    generator = random.Random(0)

    def choose_any(chain: Any, machine: Any, threads: int, **costs: Any) -> Choice:
        chosen = choose_chain(chain, machine, threads, **costs)
        height = chain.links[-1].out_height
        assert isinstance(chosen.tiling, ChainTiling)
        rows = generator.randint(1, height)
        return Choice(replace(chosen.tiling, rows=rows, step=generator.randint(1, rows)), chosen.cost)

    monkeypatch.setattr(planner, "choose_chain", choose_any)


def check(model: nn.Module, x: torch.Tensor, chains: int) -> None:
    """`model` is right, and compiles into `chains` chains."""
    compiled = sepc.compile(model.eval(), num_threads=2)
    with torch.no_grad():
        result, reference = compiled(x), model(x)
    assert (result - reference).abs().max() <= TOLERANCE * reference.abs().max()
    assert [region.kind for region in compiled.regions].count("chain") == chains


def lively(norm: nn.LayerNorm) -> nn.LayerNorm:
    """`norm` with gains and shifts drawn at random."""
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def depthwise(
    channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1, padding: int | None = None
) -> nn.Conv2d:
    pad = dilation * (kernel // 2) if padding is None else padding
    return nn.Conv2d(channels, channels, kernel, stride, pad, dilation, channels)


@pytest.mark.usefixtures("always_fuse", "any_window")
@pytest.mark.parametrize(
    ("name", "model", "shape"),
    [
        ("depthwise, pointwise", lambda: nn.Sequential(depthwise(20), nn.ReLU6(), pointwise(20, 37)), (1, 20, 13, 11)),
        (
            "pointwise, depthwise",
            lambda: nn.Sequential(pointwise(20, 37), nn.SiLU(), depthwise(37, 5)),
            (2, 20, 13, 11),
        ),
        (
            "inverted residual",
            lambda: Residual(
                nn.Sequential(pointwise(16, 40), nn.ReLU6(), depthwise(40), nn.ReLU6(), pointwise(40, 16))
            ),
            (3, 16, 14, 14),
        ),
        (
            "inverted residual, stride 2",
            lambda: nn.Sequential(pointwise(16, 40), nn.ReLU6(), depthwise(40, 3, 2), nn.ReLU6(), pointwise(40, 24)),
            (1, 16, 15, 17),
        ),
        (
            "stem, depthwise, pointwise",
            lambda: nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), depthwise(16), nn.ReLU(), pointwise(16, 8)),
            (1, 3, 33, 31),
        ),
        (
            "two depthwise",
            lambda: nn.Sequential(depthwise(20, 3, 2), nn.ReLU(), depthwise(20, 5, 2, 1)),
            (1, 20, 41, 40),
        ),
        (
            "dilated depthwise, whose window is larger than the image",
            lambda: nn.Sequential(pointwise(8, 20), depthwise(20, 3, 1, 6)),
            (1, 8, 9, 9),
        ),
        (
            "no padding",
            lambda: nn.Sequential(pointwise(8, 20), depthwise(20, 3, 1, 1, 0), pointwise(20, 8)),
            (1, 8, 9, 9),
        ),
        (
            "asymmetric zero padding between the links",
            lambda: nn.Sequential(
                pointwise(8, 20), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(20, 20, 3, 2, groups=20), pointwise(20, 8)
            ),
            (1, 8, 10, 12),
        ),
        (
            "grouped in the middle",
            lambda: nn.Sequential(pointwise(8, 24), nn.Conv2d(24, 24, 3, 1, 1, groups=6), pointwise(24, 8)),
            (1, 8, 10, 12),
        ),
        ("ConvNeXt", lambda: ConvNextBlock(20), (2, 20, 9, 11)),
        ("MetaFormer", lambda: MetaFormerBlock(24), (1, 24, 9, 11)),
        (
            "two normalisations, each with its own gains",
            lambda: OverLastDimension(
                nn.Sequential(lively(nn.LayerNorm(8)), nn.Linear(8, 20), lively(nn.LayerNorm(20)))
            ),
            (1, 8, 9, 11),
        ),
        ("squeeze and excite", lambda: Excited(20), (2, 20, 9, 11)),
        ("two pointwise", lambda: nn.Sequential(pointwise(16, 40), nn.GELU(), pointwise(40, 9)), (1, 16, 9, 7)),
        (
            "linear layers over images, normalised after the first",
            lambda: OverLastDimension(nn.Sequential(nn.Linear(8, 33), nn.LayerNorm(33), nn.Linear(33, 8))),
            (2, 8, 9, 7),
        ),
        (
            "stem, max pooling",
            lambda: nn.Sequential(nn.Conv2d(3, 20, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            (1, 3, 33, 31),
        ),
        (
            "average pooling between, the last windows cut off",
            lambda: nn.Sequential(depthwise(20), nn.AvgPool2d(3, 2, ceil_mode=True), pointwise(20, 9)),
            (2, 20, 14, 12),
        ),
        (
            "transposed on the way: normalised along rows",
            lambda: nn.Sequential(pointwise(4, 20), nn.LayerNorm(11), depthwise(20)),
            (1, 4, 9, 11),
        ),
    ],
)
def test_chains_agree_with_pytorch(name: str, model: Any, shape: tuple[int, ...]) -> None:
    check(model(), torch.randn(shape), chains=0 if "normalised along rows" in name else 1)


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """Two or three random convolutions, one of them with a window, and an input."""
    channels = draw(st.integers(1, 40))
    size = [draw(st.integers(8, 24)) for _ in range(2)]
    x = torch.randn(draw(st.integers(1, 2)), channels, *size)
    modules: list[nn.Module] = []
    kinds = draw(st.permutations(["depthwise", "pointwise", draw(st.sampled_from(["depthwise", "pointwise"]))]))
    for kind in kinds[: draw(st.integers(2, 3))] if "depthwise" in kinds[:2] else kinds:
        if kind == "pointwise":
            outputs = draw(st.integers(1, 40))
            modules.append(pointwise(channels, outputs))
            channels = outputs
        else:
            modules.append(depthwise(channels, draw(st.sampled_from([2, 3, 5])), draw(st.integers(1, 2))))
        modules.append(draw(st.sampled_from(ACTIVATIONS))())
    return nn.Sequential(*modules), x


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=chains())
@pytest.mark.usefixtures("always_fuse", "any_window")
def test_random_chains_agree_with_pytorch(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    compiled = sepc.compile(model.eval(), num_threads=2)
    with torch.no_grad():
        result, reference = compiled(x), model(x)
    assert (result - reference).abs().max() <= TOLERANCE * reference.abs().max()


@pytest.mark.usefixtures("always_fuse")
def test_values_inside_a_chain_take_no_memory_of_their_own() -> None:
    model = nn.Sequential(pointwise(8, 64), nn.ReLU(), depthwise(64), nn.ReLU(), pointwise(64, 8)).eval()
    x = torch.randn(1, 8, 64, 64)
    compiled = sepc.compile(model, num_threads=1, example_inputs=(x,))
    inner_bytes = 4 * 64 * 64 * 64
    assert compiled.arena_bytes < inner_bytes
