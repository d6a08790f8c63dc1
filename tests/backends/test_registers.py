"""Blocks of dense convolutions: narrow vectors that share registers or are widened, inputs loaded several at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import sepc
from sepc.cost_model import planner, search
from sepc.cost_model.tiling import DenseTiling, Narrow
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import Convolution
from sepc.ir.stage import Stage
from sepc.target import Target

LANES = Target.parse("native").vector_lanes


@contextmanager
def blocks_of(columns: int, narrow: Narrow, most_vectors: int = 4, step_channels: int = 1) -> Iterator[None]:
    """Every convolution is computed in blocks of so many columns, narrower vectors held and inputs loaded as said."""

    def choose(
        stage: Stage, machine: search.Machine, threads: int, *, mixing: search.Mixing = "pixels", **costs: int
    ) -> search.Choice:
        if not isinstance(stage, Convolution):
            return search.choose(stage, machine, threads, mixing=mixing, **costs)
        panel = split_lanes(stage.group_out, machine.vector_lanes)[:most_vectors]
        panels = ceil_div(stage.group_out, sum(panel))
        tiling = DenseTiling(columns, panel, 1, 2, panels, narrow, step_channels)
        return search.Choice(tiling, search.predict(stage, tiling, machine, threads, **costs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose", choose)
        yield


LAYERS = {
    "one tap": nn.Conv2d(5, LANES + LANES // 2, 1),
    "one tap and input channel": nn.Conv2d(1, LANES + LANES // 2, 1),
    "no bias": nn.Conv2d(7, LANES + LANES // 2, 1, bias=False),
    "several narrower vectors": nn.Conv2d(6, LANES + LANES // 2 + 3, 1),
    "a tail of panels": nn.Conv2d(6, 2 * LANES + LANES // 2, 1),
    "columns that lack taps": nn.Conv2d(4, LANES + LANES // 2, 3, padding=1),
    "stride and dilation": nn.Conv2d(4, LANES + LANES // 2, (3, 5), stride=2, dilation=2, padding=(2, 4)),
    "groups": nn.Conv2d(6, 3 * (LANES + LANES // 2), 3, padding=1, groups=3),
}


@pytest.mark.parametrize("narrow", ["in pairs", "widened"])
@pytest.mark.parametrize("columns", [4, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_however_registers_hold_narrow_vectors_results_are_right(name: str, columns: int, narrow: Narrow) -> None:
    layer, x = LAYERS[name].eval(), torch.randn(2, LAYERS[name].in_channels, 11, 13)
    most_vectors = 1 if name == "a tail of panels" else 4
    with blocks_of(columns, narrow, most_vectors), torch.no_grad():
        compiled = sepc.compile(nn.Sequential(layer, nn.ReLU6()), num_threads=2)
        result, reference = compiled(x), torch.relu(layer(x)).clamp(max=6)
    assert (result - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_however_many_inputs_a_load_brings_results_are_right(name: str, channels_last: bool) -> None:
    layer, x = LAYERS[name].eval(), torch.randn(2, LAYERS[name].in_channels, 11, 13)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with blocks_of(5, "alone", step_channels=4), torch.no_grad():
        compiled = sepc.compile(nn.Sequential(layer, nn.ReLU6()), num_threads=2)
        result, reference = compiled(x), torch.relu(layer(x)).clamp(max=6)
    assert (result - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_channels_are_loaded_several_inputs_at_a_time(rows: int) -> None:
    layer, x = nn.Linear(4 * LANES + 3, 2 * LANES).eval(), torch.randn(rows, 4 * LANES + 3)
    with blocks_of(1, "alone", step_channels=LANES), torch.no_grad():
        compiled = sepc.compile(layer, num_threads=1, example_inputs=(x,))
        result, reference = compiled(x), layer(x)
    assert f"{LANES} inputs a load" in compiled.regions[0].tiling
    assert (result - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_infinite_inputs_stay_with_their_column() -> None:
    layer, x = nn.Conv2d(4, LANES + LANES // 2, 1).eval(), torch.randn(1, 4, 1, 6)
    x[..., 2] = torch.inf
    with blocks_of(4, "in pairs"), torch.no_grad():
        result, reference = sepc.compile(layer)(x), layer(x)
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_halves_are_put_together_by_masks_and_not_by_permutations() -> None:
    layer, x = nn.Conv2d(144, 24, 1).eval(), torch.randn(1, 144, 28, 28)
    compiled = sepc.compile(layer, target="x86:znver5", num_threads=1, example_inputs=(x,))
    (region,) = (region for region in compiled.regions if region.kind == "convolution")
    assert "16+8 in pairs" in region.tiling
    code = compiled.source(region, "asm")
    assert "{%k" in code
    assert "vperm" not in code
    # Two columns share the second vector: three multiply-adds instead of four, and none of half the width but for the
    # last column of a block of an odd number.
    full, half = (sum("vfmadd" in line and width in line for line in code.splitlines()) for width in ("%zmm", "%ymm"))
    assert full > 10 * half


@pytest.mark.parametrize(
    ("target", "channels", "narrow"),
    [
        ("x86:znver5", 24, "in pairs"),
        ("x86:sapphirerapids", 24, "alone"),
        ("arm64:neoverse-n1", 24, "alone"),
        ("arm64:neoverse-n1", 10, "widened"),
        ("arm64:cortex-a72", 10, "alone"),
    ],
)
def test_how_registers_hold_narrow_vectors_follows_from_the_machine(target: str, channels: int, narrow: Narrow) -> None:
    stage, machine = Convolution(1, 1, 3136, 1, 3136, 96, channels), Target.parse(target).machine
    choice = search.choose(stage, machine, 1)
    assert isinstance(choice.tiling, DenseTiling)
    assert choice.tiling.narrow == narrow
