"""Every kernel against PyTorch, over shapes and options drawn at random, and over every kind of legal tiling."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import sepc
from sepc.cost_model.tiling import LaneTiling
from tests.tilings import any_tiling, tilings

TOLERANCE = 1e-4
SETTINGS = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Parallel(nn.Module):
    """Several independent modules, each with an input of its own: one compilation, many kernels."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part(value) for part, value in zip(self.parts, inputs, strict=True)]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def check(
    cases: Sequence[tuple[nn.Module, torch.Tensor]], target: str = "native", threads: int = 2, kernel: str = "sepc"
) -> sepc.CompiledModel:
    """Compile the modules of `cases` and compare with eager on their inputs; all regions must be run by `kernel`."""
    model, inputs = Parallel([module for module, _ in cases]).eval(), [value for _, value in cases]
    compiled = sepc.compile(model, target=target, num_threads=threads)
    with torch.no_grad():
        for result, reference, (module, value) in zip(compiled(inputs), model(inputs), cases, strict=True):
            assert result.shape == reference.shape
            error = (result - reference).abs().max() / reference.abs().max().clamp(min=1e-6)
            assert error <= TOLERANCE, f"{module} on {tuple(value.shape)}: relative error {error:.2g}"
    others = [(region.name, region.reason) for region in compiled.regions if region.kernel != kernel]
    assert not others
    return compiled


@dataclass(frozen=True)
class ConvolutionCase:
    """Options of a random convolution and its input."""

    rank: int
    batch: int
    groups: int
    group_in: int
    group_out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    extra: tuple[int, ...]
    bias: bool
    channels_last: bool

    def build(self) -> tuple[nn.Module, torch.Tensor]:
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[self.rank](
            self.groups * self.group_in,
            self.groups * self.group_out,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
        )
        # As small as the padded kernel allows, and a bit more.
        sizes = [
            max(1, (k - 1) * d + 1 - 2 * p) + e
            for k, d, p, e in zip(self.kernel, self.dilation, self.padding, self.extra, strict=True)
        ]
        value = torch.randn(self.batch, self.groups * self.group_in, *sizes)
        return convolution, channels_last(value) if self.channels_last else value


def channels_last(value: torch.Tensor) -> torch.Tensor:
    return value.movedim(1, -1).contiguous().movedim(-1, 1)


@st.composite
def convolutions(draw: st.DrawFn, kind: str) -> ConvolutionCase:
    rank = draw(st.sampled_from([1, 2, 2, 3]))

    def spatial(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    pointwise = kind == "pointwise"
    if kind == "grouped":
        groups, group_in, group_out = draw(st.integers(2, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 20))
    elif kind == "depthwise":
        groups, group_in, group_out = draw(st.integers(2, 70)), 1, draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    else:
        groups, group_in, group_out = 1, draw(st.integers(1, 70)), draw(st.integers(1, 70))
    return ConvolutionCase(
        rank,
        draw(st.sampled_from([1, 1, 3])),
        groups,
        group_in,
        group_out,
        (1,) * rank if pointwise else spatial(1, 7 if rank < 3 else 3),
        spatial(1, 1) if pointwise and draw(st.booleans()) else spatial(1, 3),
        (1,) * rank if pointwise else spatial(1, 3),
        (0,) * rank if pointwise else spatial(0, 4),
        spatial(0, 30 if rank < 3 else 8),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@pytest.mark.parametrize("kind", ["pointwise", "dense", "grouped", "depthwise"])
@SETTINGS
@given(data=st.data())
def test_convolutions_of_all_shapes_agree_with_pytorch(kind: str, data: st.DataObject) -> None:
    cases = data.draw(st.lists(convolutions(kind), min_size=6, max_size=6))
    check([case.build() for case in cases])


@pytest.mark.parametrize("kind", ["pointwise", "dense", "depthwise"])
@SETTINGS
@given(data=st.data())
def test_every_legal_tiling_gives_the_right_result(kind: str, data: st.DataObject) -> None:
    cases = data.draw(st.lists(convolutions(kind), min_size=6, max_size=6))
    with any_tiling(data.draw(st.integers(0, 1000))):
        check([case.build() for case in cases])


def test_long_rows_of_taps_in_parts_agree_with_pytorch() -> None:
    cases: list[tuple[nn.Module, torch.Tensor]] = []
    for taps, stride, dilation in ((11, 1, 1), (12, 1, 1), (23, 1, 1), (31, 1, 1), (31, 2, 1), (13, 1, 3), (22, 2, 2)):
        padding = taps * dilation // 2
        depthwise = nn.Conv1d(20, 20, taps, stride, padding, dilation, groups=20)
        grouped = nn.Conv1d(8, 16, taps, stride, padding, dilation, groups=4)
        cases += [(depthwise, torch.randn(2, 20, 150)), (grouped, torch.randn(1, 8, 150))]
    cases.append((nn.Conv2d(16, 16, (3, 25), padding=(1, 12), groups=16), torch.randn(1, 16, 9, 80)))
    check(cases)


@pytest.mark.parametrize("target", ["x86-64-v3", "native"])
@pytest.mark.parametrize(("channels", "vectors", "turns"), [(64, 1, 2), (64, 1, 4), (72, 2, 2), (83, 1, 3), (20, 2, 2)])
def test_channels_in_turns_agree_with_pytorch(target: str, channels: int, vectors: int, turns: int) -> None:
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    pairs = nn.Conv2d(2 * channels, channels, (1, 5), groups=channels)
    cases: list[tuple[nn.Module, torch.Tensor]] = [
        (depthwise, torch.randn(2, channels, 9, 11)),
        (pairs, torch.randn(1, 2 * channels, 9, 11)),
    ]
    with tilings(lambda candidates: LaneTiling(5, vectors, 4, 2, turns=turns)):
        compiled = check(cases, target)
    tiled = [one.tiling for one in compiled.regions if one.kind == "convolution"]
    assert all(f"in {turns} turns" in one for one in tiled)
    assert len(tiled) == 2


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """Any options of a transposed convolution, and an input large enough for them."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))

    def spatial(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(rank)]

    most = 3 if rank < 3 else 2
    kernel, stride, dilation, padding = spatial(1, most + 2), spatial(1, most), spatial(1, 3), spatial(0, 3)
    extra = [draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True)]
    sizes = [
        max(1, math.ceil((2 * p - d * (k - 1) - e) / s) + 1) + draw(st.integers(0, 9 if rank < 3 else 4))
        for k, s, d, p, e in zip(kernel, stride, dilation, padding, extra, strict=True)
    ]
    groups, group_in, group_out = draw(st.sampled_from([(1, 9, 20), (1, 3, 16), (3, 4, 5), (19, 1, 1), (8, 1, 2)]))
    make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    channels = (groups * group_in, groups * group_out)
    convolution = make(*channels, kernel, stride, padding, extra, groups, draw(st.booleans()), dilation)
    value = torch.randn(draw(st.sampled_from([1, 2])), groups * group_in, *sizes)
    layers: list[nn.Module] = [convolution, nn.ReLU()] if draw(st.booleans()) else [convolution]
    return nn.Sequential(*layers), channels_last(value) if draw(st.booleans()) else value


@SETTINGS
@given(data=st.data())
def test_transposed_convolutions_of_all_shapes_agree_with_pytorch(data: st.DataObject) -> None:
    cases = data.draw(st.lists(transposed_convolutions(), min_size=4, max_size=4))
    with any_tiling(seed) if (seed := data.draw(st.integers(0, 9))) else nullcontext():
        check(cases)


def test_transposed_convolutions_whose_phases_lack_taps_give_the_bias_there() -> None:
    x = torch.randn(1, 8, 5, 6)
    x[0, 3, 2, 2] = math.inf
    module = nn.ConvTranspose2d(8, 20, (1, 2), (3, 3), dilation=(1, 3)).eval()
    result, reference = sepc.compile(module)(x), module(x).detach()
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("seed", range(3))
def test_windows_wider_than_a_tile_of_rows_are_right_in_every_tiling(seed: int) -> None:
    # TVM simplified the bounds of such windows to wrong constants while they were quotients.
    wide = torch.randn(2, 16, 14, 14)
    cases: list[tuple[nn.Module, torch.Tensor]] = [
        (nn.Conv2d(16, 32, 3, padding=dilation, dilation=dilation), wide) for dilation in (6, 12, 13, 24)
    ]
    cases += [(nn.Conv2d(16, 16, 3, 1, dilation, dilation, 16), wide) for dilation in (6, 12, 13)]
    cases += [(nn.MaxPool2d(3, 1, 1, dilation=1), wide), (nn.AvgPool2d(5, 3, 2), wide)]
    cases += [(nn.AdaptiveAvgPool2d(size), wide) for size in (1, 3, 5, 11, 14, 28)]
    with any_tiling(seed):
        check(cases)


def test_avx2_kernels_agree_with_pytorch() -> None:
    check(
        [
            (nn.Conv2d(20, 37, 3, padding=1), torch.randn(2, 20, 13, 17)),
            (nn.Conv2d(37, 37, 5, 2, 2, groups=37), torch.randn(2, 37, 13, 17)),
            (nn.Linear(33, 50), torch.randn(7, 33)),
            (nn.LayerNorm(50), torch.randn(7, 50)),
        ],
        target="x86-64-v3",
    )


def test_linear_layers_of_any_rank_agree_with_pytorch() -> None:
    shapes = [(1, 64), (5, 33), (2, 3, 17), (2, 3, 5, 40)]
    check([(nn.Linear(shape[-1], 21 + index), torch.randn(shape)) for index, shape in enumerate(shapes)])


def test_poolings_agree_with_pytorch() -> None:
    x = torch.randn(2, 21, 13, 11)
    modules: list[nn.Module] = [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((2, 3), (1, 2), (1, 0), dilation=(2, 1)),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d((3, 4)),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((20, 13)),
    ]
    check([(module, x) for module in modules])
    check([(nn.AvgPool1d(3, 2, 1), torch.randn(2, 19, 30)), (nn.MaxPool1d(2), torch.randn(2, 19, 30))])


def test_poolings_of_volumes_agree_with_pytorch() -> None:
    x = torch.randn(2, 21, 5, 9, 7)
    modules: list[nn.Module] = [
        nn.MaxPool3d(3, 2, 1),
        nn.MaxPool3d((2, 3, 1), (1, 2, 2), (1, 0, 0), dilation=(2, 1, 1)),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.AvgPool3d(3, 2, 1),
        nn.AvgPool3d(3, 2, 1, count_include_pad=False),
        nn.AvgPool3d(2, ceil_mode=True),
        nn.AvgPool3d(2, divisor_override=3),
        nn.AdaptiveAvgPool3d((3, 4, 2)),
        nn.AdaptiveAvgPool3d(1),
        nn.AdaptiveAvgPool3d((7, 9, 13)),
    ]
    check([(module, x) for module in modules])
    check([(module, channels_last(x)) for module in modules])


def test_max_pooling_keeps_nan_and_negative_infinity() -> None:
    x = torch.randn(1, 16, 6, 6)
    x[0, 3, 2, 2] = math.nan
    x[0, 5] = -math.inf
    module = nn.MaxPool2d(3, 2, 1).eval()
    assert torch.equal(sepc.compile(module)(x).nan_to_num(nan=7.0), module(x).nan_to_num(nan=7.0))


def test_layer_norms_agree_with_pytorch() -> None:
    check([(nn.LayerNorm(channels), torch.randn(2, 5, channels) * 3 + 2) for channels in (1, 7, 16, 40, 64, 96, 131)])


ELEMENTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "clamp": lambda x: x.clamp(-0.5, 0.25),
    "clamp_min": lambda x: x.clamp_min(-0.5),
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "erf": torch.erf,
    "exp": torch.exp,
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.square() + 1).rsqrt(),
    "reciprocal": lambda x: (x.square() + 1).reciprocal(),
    "negate": lambda x: -x,
    "scalars": lambda x: (2 - x * 3 + 1) / 7,
    "alpha": lambda x: torch.add(x, x.abs(), alpha=2),
    "self": lambda x: x * torch.sigmoid(x) - x / (1 + x.square()),
    "maximum": lambda x: torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "broadcast": lambda x: x * x[:, :, :1, :1] + x[:1],
    "transposed": lambda x: x + x.transpose(2, 3).transpose(2, 3).flip(0),
}


def test_elementwise_operators_agree_with_pytorch() -> None:
    x = torch.randn(2, 19, 5, 7) * 3
    check([(Function(function), x) for name, function in ELEMENTWISE.items() if name != "transposed"])


@pytest.mark.parametrize("name", ["relu", "relu6", "hardswish", "silu", "gelu", "tanh", "sigmoid", "maximum"])
def test_elementwise_operators_keep_nan(name: str) -> None:
    x = torch.randn(1, 16, 4, 4)
    x[0, 1, 2, 3] = math.nan
    module = Function(ELEMENTWISE[name]).eval()
    assert torch.equal(sepc.compile(module)(x).isnan(), module(x).isnan())


def test_copies_that_transpose_agree_with_pytorch() -> None:
    generator = random.Random(0)
    shapes = [(1, 16, 256), (2, 16, 16), (3, 5, 7), (1, 1, 40), (1, 40, 1), (1, 33, 300)]
    shapes += [(generator.randint(1, 3), generator.randint(1, 90), generator.randint(1, 400)) for _ in range(4)]
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x.transpose(1, 2).contiguous(),
        lambda x: (x.transpose(1, 2) * 2 + x.reshape(x.shape[0], x.shape[2], x.shape[1])).contiguous(),
    ]
    for target in ("native", "x86-64-v3"):
        check([(Function(function), torch.randn(shape)) for shape in shapes for function in functions], target)


def test_concatenations_along_every_dimension_agree_with_pytorch() -> None:
    for dim in range(4):
        module = Function(lambda x, dim=dim: torch.cat([x, x.relu(), x], dim=dim))
        check([(module, torch.randn(2, 19, 5, 7))])
