"""`sepc.separate` keeps within the budget that it is given, tells what it did, and returns an ordinary model."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sepc
from sepc.separation import menus, report
from sepc.separation.latency import Timing, timing
from tests.separable.networks import network, smooth_images

SPEEDUP = 1.4


@pytest.fixture(scope="module")
def data() -> torch.Tensor:
    torch.manual_seed(1)
    return smooth_images(70, size=28)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(2)
    return network(channels=64)


def relative_error(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((other(x) - model(x)).norm() / model(x).norm())


def separated(model: nn.Module, data: torch.Tensor, **options: Any) -> sepc.Separation:
    """For a target that does not run here, as far as sepc knows: times are then those predicted, on any machine."""
    found: sepc.Separation = sepc.separate(
        model, calibration=data, target="x86-64-v3", num_threads=1, steps=5, forms=("bottleneck", "channels"), **options
    )
    return found


def quick(patch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and a layer has few options, of coarse fits: enough to choose from."""
    patch.setattr("sepc.target.Target.is_runnable", property(lambda self: False))
    patch.setattr(menus, "MENU_STEPS", 1)
    patch.setattr(menus, "RANKS", 4)
    patch.setattr(menus, "RANK_RATIO", 0.5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture(scope="module")
def fast(model: nn.Module, data: torch.Tensor) -> sepc.Separation:
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        return separated(model, data, speedup=SPEEDUP)


def test_a_speed_up_is_reached_at_a_small_error(fast: sepc.Separation, model: nn.Module, data: torch.Tensor) -> None:
    before, after = fast.predicted_us
    assert before / after > 0.9 * SPEEDUP, "the whole may be fused otherwise than layers alone are"
    assert 0 < fast.error < 0.2
    assert fast.error == pytest.approx(relative_error(model, fast.model, data[:64]), rel=1e-3)
    assert fast.measured_us is None
    assert fast.multiply_adds[1] < fast.multiply_adds[0]
    assert not fast.reason


def test_the_result_compiles_to_the_same_outputs(
    fast: sepc.Separation, model: nn.Module, data: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    x = data[:1]
    with torch.no_grad():
        expected = fast.model(x)
    for compiled in (sepc.compile(fast.model), sepc.compile(model, separate=fast.plan)):
        assert float((compiled(x) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_the_table_has_a_row_for_each_layer(fast: sepc.Separation) -> None:
    text = str(fast)
    assert text.startswith("Separated for a speed-up of 1.4.")
    assert all(len(line) <= 120 for line in text.splitlines())
    for one in fast.layers:
        assert any(line.startswith(one.path) and one.form in line for line in text.splitlines())
    assert [one.path for one in fast.layers] == ["0", "3.first", "3.second", "3.skip", "4"]
    assert {one.path for one in fast.layers if one.rank} == set(fast.plan.layers)
    assert f"error of the results on the calibration data: {fast.error:.4f}" in text


def test_the_original_is_not_changed(fast: sepc.Separation, model: nn.Module) -> None:
    torch.manual_seed(2)
    fresh = network(channels=64).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def test_an_error_is_kept_and_a_larger_one_is_used(model: nn.Module, data: torch.Tensor) -> None:
    small, large = (separated(model, data, max_error=limit) for limit in (0.02, 0.2))
    assert small.error <= 0.02
    assert small.error < large.error <= 0.2
    assert large.predicted_us[1] < small.predicted_us[1] <= small.predicted_us[0]


def test_the_users_own_figure_is_kept(model: nn.Module, data: torch.Tensor) -> None:
    asked: list[nn.Module] = []

    def evaluate(candidate: nn.Module) -> float:
        asked.append(candidate)
        return -relative_error(model, candidate, data)

    found = separated(model, data, evaluate=evaluate, max_drop=0.1)
    assert -0.1 <= evaluate(found.model) < 0
    assert found.plan.layers
    assert "a drop of 0.1 at most" in str(found)
    assert model in asked


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"speedup": 50.0}, "the most that all forms together are predicted to gain is"),
        ({"max_error": 1e-6}, "even the smallest change that was tried gives an error of"),
        ({"evaluate": lambda model: float(not hasattr(model[4], "__len__")), "max_drop": -1.0}, "was tried gives"),
    ],
)
def test_where_nothing_is_within_the_budget_the_model_comes_back(
    model: nn.Module, data: torch.Tensor, options: dict[str, Any], reason: str
) -> None:
    found = separated(model, data[:64], **options)
    assert found.plan.layers == {}
    assert reason in found.reason
    assert f"Nothing was replaced: {found.reason}" in str(found)
    assert relative_error(model, found.model, data[:4]) == 0
    assert found.predicted_us[0] == found.predicted_us[1]


def test_where_there_is_no_layer_the_model_comes_back(data: torch.Tensor) -> None:
    found = separated(nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU()), data, max_error=0.5)
    assert found.reason == "no form is predicted faster"
    assert found.left == {"0": "it has one channel"}
    assert "Left as they are: 0 (it has one channel)." in str(found)


def test_without_data_weights_alone_are_approximated(model: nn.Module, data: torch.Tensor) -> None:
    found = sepc.separate(
        model, example_inputs=data[:1], target="x86-64-v3", max_error=0.8, steps=5, forms=("channels",)
    )
    assert found.plan.layers
    assert math.isnan(found.error)
    assert math.hypot(*(one.error for one in found.plan.layers.values())) <= 0.8


def test_a_loader_with_labels_gives_what_its_tensors_give(model: nn.Module, data: torch.Tensor) -> None:
    loader = DataLoader(TensorDataset(data, torch.zeros(len(data))), batch_size=40)
    ways: tuple[Any, ...] = (loader, data[:66], [data[:30], data[30:]])
    plans = [separated(model, one, speedup=1.2, calibration_size=64).plan for one in ways]
    assert plans[0].layers.keys() == plans[1].layers.keys() == plans[2].layers.keys()
    weights = [torch.cat([one.factors[0].flatten() for one in plan.layers.values()]) for plan in plans]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_every_target_has_a_plan_of_its_own(model: nn.Module, data: torch.Tensor) -> None:
    times = [
        sepc.separate(
            model, example_inputs=data[:1], target=target, speedup=1.3, steps=0, num_threads=1, forms=("channels",)
        ).predicted_us
        for target in ("x86-64-v3", "x86:znver5")
    ]
    assert times[0][0] > times[1][0]
    assert all(after < before for before, after in times)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "There is no budget"),
        ({"max_error": 0.1, "speedup": 2.0}, "There is more than one budget"),
        ({"evaluate": lambda model: 1.0}, "or half of one"),
        ({"max_drop": 0.1, "speedup": 2.0}, "or half of one"),
        ({"max_error": -1.0}, "max_error is -1.0"),
        ({"speedup": 0.5}, "speedup is 0.5"),
        ({"speedup": 2.0, "forms": ("nonsense",)}, "There is no form 'nonsense'"),
        ({"speedup": 2.0, "calibration": []}, "There is no calibration data"),
        ({"speedup": 2.0, "calibration": [{"x": 1}]}, "Inputs must be tensors with a batch dimension"),
        ({"speedup": 2.0, "calibration": None}, "There is no input to be fast for"),
    ],
)
def test_what_does_not_make_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sepc.InputError, match=message):
        sepc.separate(network(), **{"calibration": smooth_images(2), **options})


def test_data_that_is_not_finite_is_refused(model: nn.Module, data: torch.Tensor) -> None:
    with pytest.raises(sepc.InputError, match="Values inside the model are not finite"):
        separated(model, data[:64] * float("inf"), speedup=2.0)


def test_a_branch_that_begins_at_zero_does_no_harm(data: torch.Tensor) -> None:
    other = network(channels=64)
    with torch.no_grad():
        other[3].norm.weight.zero_()
    found = separated(other, data[:64], speedup=1.3)
    assert found.error < 0.2


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(sepc.ModelError, match="training mode"):
        sepc.separate(network().train(), calibration=smooth_images(2), speedup=2.0)


class Timings:
    """Times by the number of attempts: as if what was predicted had been too hopeful."""

    def __init__(self, *gains: float) -> None:
        self.gains = list(gains)

    def __call__(self, *_: object) -> Timing:
        return Timing(self.gains.pop(0), 100.0, math.nan)  # Of noisy turns the medians have another ratio.


@pytest.mark.parametrize(
    ("gains", "measured"), [((1.1, 1.21), 1.21), ((1.5, 1.3, 1.1, 1.21), 1.21), ((1.5, 1.1, 1.1, 1.1, 1.1), 1.5)]
)
def test_what_is_measured_decides_on_the_speed_up(
    model: nn.Module,
    data: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    gains: tuple[float, ...],
    measured: float,
) -> None:
    monkeypatch.setattr("sepc.target.Target.is_runnable", property(lambda self: True))
    timings = Timings(*gains)
    monkeypatch.setattr("sepc.separation.search.measure", timings)
    found = sepc.separate(
        model, example_inputs=data[:1], target="x86-64-v3", speedup=1.2, steps=0, num_threads=1, forms=("channels",)
    )
    assert found.measured_us is not None
    assert found.measured_us[0] / found.measured_us[1] == pytest.approx(measured)
    assert not timings.gains


def test_both_models_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(report, "timing", partial(timing, rounds=2))
    x = smooth_images(8, size=28)
    found = sepc.separate(network(64), calibration=x, max_error=5.0, steps=0, num_threads=1, forms=("channels",))
    assert found.measured_us is not None
    assert all(time_us > 0 for time_us in found.measured_us)
    assert "Measured for the whole model" in str(found)
