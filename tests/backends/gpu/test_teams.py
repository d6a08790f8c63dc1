"""Reductions that threads of a team share: against PyTorch under every tiling, and what they load and store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn

import sepc
from sepc.cost_model import gpu_planner
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_teams import predict_teams, team_footprint, team_tilings
from sepc.cost_model.search import Choice
from sepc.ir.element import ELEMENTS, ElementName
from sepc.ir.stage import Stage
from tests.backends.gpu.accesses import Accesses
from tests.gpus import agrees, needs_nvcc, needs_opencl
from tests.helpers import Function

MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "layer normalisation": (nn.LayerNorm(96), (6, 96)),
    "layer normalisation, odd channels": (nn.LayerNorm(75), (5, 75)),
    "RMS normalisation": (nn.RMSNorm(50), (2, 3, 50)),
    "softmax": (nn.Softmax(-1), (4, 150)),
    "global average": (nn.AdaptiveAvgPool2d(1), (2, 24, 9, 7)),
    "global average, odd channels": (nn.AdaptiveAvgPool2d(1), (2, 13, 7, 7)),
    "global average of volumes": (nn.AdaptiveAvgPool3d(1), (1, 8, 3, 4, 5)),
}
EXACT = ("layer normalisation", "RMS normalisation", "softmax", "global average")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Teams by tiling "number" of those that there are, as the quickest; tells it, and the stage."""
    told: dict[str, Any] = {"number": 0}

    def choose_teams(stage: Stage, machine: GpuMachine, *costs: int) -> Choice | None:
        tilings = list(team_tilings(stage, machine))
        if not tilings:
            return None
        told["stage"], told["tiling"] = stage, tilings[told["number"]]
        cost = predict_teams(stage, tilings[told["number"]], machine, *costs)
        return Choice(told["tiling"], replace(cost, time_us=0.0))

    monkeypatch.setattr(gpu_planner, "choose_teams", choose_teams)
    return told


@needs_opencl
@pytest.mark.parametrize("dtype", get_args(ElementName))
@pytest.mark.parametrize("name", MODELS)
def test_the_smallest_and_the_largest_teams_agree_with_eager(
    name: str, dtype: ElementName, chosen: dict[str, Any]
) -> None:
    model, shape = MODELS[name]
    for number in (0, -1):
        chosen["number"] = number
        compiled = agrees(model, torch.randn(shape) + 3, dtype=dtype)
        assert str(chosen["tiling"]) in [one.tiling for one in compiled.regions]


@needs_opencl
def test_what_is_not_a_number_spoils_its_row_and_no_other() -> None:
    x = torch.randn(3, 64)
    x[1, 40] = torch.nan
    compiled = sepc.compile(nn.Softmax(-1).eval(), target="opencl")
    torch.testing.assert_close(compiled(x), torch.softmax(x, -1), equal_nan=True)


@needs_opencl
def test_elementwise_operators_follow_in_the_same_kernel() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y * torch.sigmoid(self.pool(y) - 0.25)

    compiled = agrees(Function(forward, pool=nn.AdaptiveAvgPool2d(1)), torch.randn(1, 16, 6, 6))
    assert any("threads for each vector of channels" in one.tiling for one in compiled.regions)


@pytest.mark.parametrize("dtype", get_args(ElementName))
@pytest.mark.parametrize("name", EXACT)
def test_teams_touch_what_the_planner_says(name: str, dtype: ElementName, chosen: dict[str, Any]) -> None:
    model, shape = MODELS[name]
    element = ELEMENTS[dtype]
    kind = getattr(torch, dtype)
    x = torch.randn(shape).to(kind)
    if name == "global average":
        x = x.to(memory_format=torch.channels_last)
    chosen["number"] = 1
    compiled = sepc.compile(model.to(kind).eval(), target="opencl", dtype=dtype, example_inputs=(x,))
    model.float()
    (region,) = (one for one in compiled.regions if "threads for each" in one.tiling)
    accesses = Accesses.of(compiled._last().lowered.functions[region.symbols[0]])
    weights = sum(count for key, count in accesses.loads.items() if not key.startswith("in_"))
    expected = team_footprint(chosen["stage"], chosen["tiling"])
    sizes = (expected.activations, expected.weights, expected.results)
    found = (accesses.loads["in_0"], weights, sum(accesses.stores.values()))
    assert found == tuple(size / element.size_bytes for size in sizes)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_no_register_spills(architecture: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16), nn.Softmax(-1))
    x = torch.randn(2, 3, 20, 20)
    compiled = sepc.compile(model.eval(), target=f"cuda:{architecture}", example_inputs=(x,))
    found = [one for region in compiled.regions if "threads for each" in region.tiling for one in region.resources]
    assert found
    assert all(one.spilled_bytes == 0 for one in found)
