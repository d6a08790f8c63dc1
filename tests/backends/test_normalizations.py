"""Group, instance, layer and RMS normalisations, however they are written, against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

import sepc
from sepc.cost_model import planner
from sepc.cost_model.group_normalization import choose_group_normalization
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import Choice
from sepc.cost_model.tiling import RowTiling
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.layout import same_strides
from tests.helpers import TOLERANCE, Function

Case = tuple[nn.Module, torch.Tensor]


class Parallel(nn.Module):
    """Several independent modules, each with an input of its own: one compilation, many kernels."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part(value) for part, value in zip(self.parts, inputs, strict=True)]


def check(cases: Sequence[Case], target: str = "native", threads: int = 2) -> sepc.CompiledModel:
    """Compile, compare with eager in float64, which loses no digits; all regions must be kernels of ours."""
    model, inputs = Parallel([module for module, _ in cases]).eval(), [value for _, value in cases]
    compiled = sepc.compile(model, target=target, num_threads=threads)
    with torch.no_grad():
        results, expected = compiled(inputs), model(inputs)
        exact = model.double()([value.double() for value in inputs])
    for result, reference, eager, (module, value) in zip(results, exact, expected, cases, strict=True):
        assert result.shape == eager.shape
        assert same_strides(eager.shape, result.stride(), eager.stride())
        error = (result - reference).abs().max() / reference.abs().max()
        assert error <= TOLERANCE, f"{module} on {tuple(value.shape)}: relative error {error:.2g}"
    assert {(one.kernel, one.reason) for one in compiled.regions} == {("sepc", "")}
    return compiled


def affine(module: nn.Module) -> nn.Module:
    """`module`, its gain and shift other than one and zero."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1.5, 1.5)
    return module


def image(*shape: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    """Random pixels, channels-last."""
    generator = torch.Generator().manual_seed(sum(shape))
    value = torch.randn(shape[0], *shape[2:], shape[1], generator=generator)
    return (value * deviation + mean).movedim(-1, 1)


GROUPS = [(1, 1), (1, 33), (2, 4), (3, 21), (4, 8), (5, 80), (7, 7), (1, 96), (2, 150)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_group_norms_of_all_widths_agree(threads: int) -> None:
    cases: list[Case] = [(affine(nn.GroupNorm(g, c)), image(1, c, 7, 9)) for g, c in GROUPS]
    cases += [(nn.GroupNorm(g, c, affine=False), image(3, c, 4, 1)) for g, c in GROUPS]
    check(cases, threads=threads)


def test_group_norms_of_one_two_and_three_dimensions_agree_in_both_layouts() -> None:
    sizes = [(2, 12, 17), (2, 12, 5, 9), (2, 12, 3, 5, 7), (1, 12, 1), (5, 12, 1, 1)]
    cases: list[Case] = [(affine(nn.GroupNorm(3, 12)), image(*size)) for size in sizes]
    check([*cases, *((module, value.contiguous()) for module, value in cases)])


def test_instance_norms_agree() -> None:
    pixels = [(nn.InstanceNorm1d, (17,)), (nn.InstanceNorm2d, (5, 9)), (nn.InstanceNorm3d, (3, 5, 7))]
    cases: list[Case] = [(kind(21), image(2, 21, *size)) for kind, size in pixels]
    cases += [(affine(kind(21, affine=True)), image(2, 21, *size)) for kind, size in pixels]
    cases += [(nn.InstanceNorm2d(6), torch.randn(6, 5, 9))]  # without a batch dimension
    check(cases)


def test_instance_norms_by_running_statistics_agree() -> None:
    norm = nn.InstanceNorm2d(21, affine=True, track_running_stats=True)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    compiled = check([(affine(norm), image(2, 21, 5, 9)), (norm, image(2, 21, 5, 9).contiguous())])
    assert all("batch_norm.default" not in one.ops for one in compiled.regions)


def test_layer_norms_over_several_dimensions_agree() -> None:
    shapes: list[tuple[tuple[int, ...], int]] = [
        ((2, 19, 5, 7), 3),
        ((2, 3, 19, 5, 7), 3),
        ((19, 5, 7), 3),
        ((2, 9, 33), 2),
        ((9, 33), 2),
        ((2, 5, 3, 4, 5), 4),
    ]
    cases: list[Case] = []
    for shape, count in shapes:
        value = torch.randn(shape)
        cases += [(affine(nn.LayerNorm(shape[-count:])), value), (nn.LayerNorm(shape[-count:], bias=False), value)]
        cases += [(nn.LayerNorm(shape[-count:], elementwise_affine=False), value)]
    check([*cases, (affine(nn.LayerNorm((19, 5, 7))), image(2, 19, 5, 7))])


def rms_by_product(self: Function, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rms_by_quotient(self: Function, x: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()


def rms_of_channels(self: Function, x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(1, keepdim=True)) * x * self.weight[:, None, None]


def test_rms_norms_agree_in_all_spellings() -> None:
    cases: list[Case] = [(affine(nn.RMSNorm(c, eps=1e-6)), torch.randn(2, 5, c) + 3) for c in (1, 7, 40, 131)]
    cases += [(nn.RMSNorm((5, 31), eps=1e-3), torch.randn(2, 3, 5, 31)), (nn.RMSNorm(9, 0.1, False), torch.randn(4, 9))]
    cases += [
        (Function(rms_by_product, weight=torch.rand(33)), torch.randn(2, 7, 33)),
        (Function(rms_by_quotient), torch.randn(7, 33)),
        (Function(rms_of_channels, weight=torch.rand(33)), image(2, 33, 5, 7)),
        (Function(rms_of_channels, weight=torch.rand(33)), torch.randn(2, 33, 5, 7)),
    ]
    compiled = check(cases)
    assert sum("rms_norm.default" in one.ops for one in compiled.regions) == len(cases)


def test_rms_norm_without_an_epsilon_takes_that_of_the_type() -> None:
    norm, x = nn.RMSNorm(64).eval(), torch.randn(4, 64) * 1e-4
    with torch.no_grad():
        expected = norm(x)
        assert (sepc.compile(norm)(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("mean", "deviation"), [(1000.0, 1.0), (-300.0, 0.3), (0.0, 1e-4)])
def test_a_mean_far_from_zero_costs_no_digits(mean: float, deviation: float) -> None:
    cases: list[Case] = [
        (nn.GroupNorm(groups, 32), image(2, 32, 40, 41, mean=mean, deviation=deviation)) for groups in (1, 8, 32)
    ]
    cases += [(nn.LayerNorm(200), image(1, 200, 7, 7, mean=mean, deviation=deviation).permute(0, 2, 3, 1))]
    check(cases)


def test_channels_of_one_group_with_different_means_agree() -> None:
    offsets = torch.linspace(-500, 500, 24)[:, None, None]
    check([(nn.GroupNorm(groups, 24), image(1, 24, 30, 30) + offsets) for groups in (1, 3, 24)], threads=3)


def test_pixels_whose_mean_drifts_agree() -> None:
    drift = torch.linspace(-200, 700, 900).reshape(30, 30)
    check([(nn.GroupNorm(groups, 24), image(1, 24, 30, 30) + drift) for groups in (1, 3, 24)], threads=3)


def test_what_is_not_finite_spreads_in_its_own_group_only() -> None:
    x = image(2, 12, 9, 9)
    x[0, 4, 3, 3], x[1, 11, 8, 8] = math.nan, math.inf
    module = nn.GroupNorm(3, 12).eval()
    result = sepc.compile(module, num_threads=2)(x)
    assert torch.equal(result.isnan(), module(x).isnan())
    assert result.isnan().any()
    assert result.isfinite().any()


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 33, 63])
def test_tasks_of_every_size_agree(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(stage: GroupNormalization, machine: Machine, threads: int, **costs: int) -> Choice:
        found = choose_group_normalization(stage, machine, threads, **costs)
        return Choice(RowTiling(min(rows, stage.pixels)), found.cost)

    monkeypatch.setattr(planner, "choose_group_normalization", choose)
    compiled = check([(affine(nn.GroupNorm(g, c)), image(2, c, 7, 9, mean=50)) for g, c in ((3, 21), (1, 70), (5, 5))])
    assert {one.tiling for one in compiled.regions} == {f"task {rows} rows"}


def test_avx2_kernels_agree() -> None:
    cases: list[Case] = [(affine(nn.GroupNorm(g, c)), image(2, c, 7, 9, mean=5)) for g, c in GROUPS]
    check([*cases, (affine(nn.RMSNorm(50)), torch.randn(7, 50))], target="x86-64-v3")


def gated(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = functional.gelu(self.norm(x) * self.scale[:, None, None]) + x
    return y * x[:, :, :1, :1]


def test_what_follows_belongs_to_the_same_kernel() -> None:
    norm = affine(nn.GroupNorm(3, 21))
    compiled = check([(Function(gated, norm=norm, scale=torch.rand(21)), image(2, 21, 5, 7))])
    (region,) = compiled.regions
    assert region.kind == "normalization"
    assert region.ops == ("group_norm.default", "mul.Tensor", "gelu.default", "add.Tensor", "mul.Tensor")


def test_pixels_that_are_a_part_of_an_image_agree() -> None:
    norm = affine(nn.GroupNorm(3, 12))
    check([(Function(lambda self, x: self.norm(x[:, 2:14, 1:-1, 2:-2]), norm=norm), image(2, 20, 9, 12))])


def test_a_group_norm_between_convolutions_agrees() -> None:
    block = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.GroupNorm(4, 24), nn.SiLU(), nn.Conv2d(24, 10, 1))
    compiled = check([(block, image(2, 16, 14, 15))])
    assert [one.kind for one in compiled.regions] == ["convolution", "normalization", "convolution"]


def test_both_phases_are_told_of_and_have_sources() -> None:
    module, x = nn.GroupNorm(2, 8).eval(), image(1, 8, 5, 5)
    compiled = sepc.compile(module, example_inputs=(x,))
    (region,) = compiled.regions
    assert len(set(region.symbols)) == 2
    assert all(symbol in compiled.source(region, "llvm") for symbol in region.symbols)
    assert compiled.profile(x)[0].measured_us > 0


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_softmax_over_every_dimension_agrees(dim: int) -> None:
    cases: list[Case] = [(nn.Softmax(dim), value) for value in (image(9, 19, 8, 10), torch.randn(8, 9, 20))]
    check(cases)
