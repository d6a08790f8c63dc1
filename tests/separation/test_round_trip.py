"""A separated model is an ordinary module: saved, loaded, exported and compiled it computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc.passes.predict import sequence_us
from sepc.separable.allocate import frontier
from sepc.separable.calibrated import Option
from sepc.separable.forms import FORMS
from sepc.separable.plan import Plan
from sepc.separation import menus
from sepc.separation.job import AS_IT_WAS, Job
from sepc.target import Target
from tests.separable.networks import network, smooth_images


class TwoInputs(nn.Module):
    """A network of an image and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.second(torch.relu(self.first(image)) * mask)
        return value.mean((2, 3))


def job_for(target: str, model: nn.Module, *example: torch.Tensor) -> Job:
    return Job(model, [], example, Target.parse(target), 1, ("bottleneck", "channels"), steps=0, seed=0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(2)
    return network(channels=64)


@pytest.fixture
def result(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> sepc.Separation:
    monkeypatch.setattr(menus, "RANKS", 2)
    monkeypatch.setattr("sepc.target.Target.is_runnable", property(lambda self: False))
    images = smooth_images(24, size=28)
    found = sepc.separate(
        model, calibration=images, speedup=1.3, forms=("channels",), steps=1, distill_steps=2, target="x86-64-v3"
    )
    monkeypatch.undo()
    assert found.plan.layers
    assert "Distilled in 2 steps" in str(found)
    return found


def test_a_model_goes_round_with_the_same_results(result: sepc.Separation, model: nn.Module, tmp_path: Path) -> None:
    x = smooth_images(1, size=28)
    with torch.no_grad():
        expected = result.model(x)
        result.plan.save(tmp_path / "plan.pt")
        torch.save(result.model.state_dict(), tmp_path / "weights.pt")
        plan = Plan.load(tmp_path / "plan.pt")
        again = plan.apply(network(channels=64))
        again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        exported = torch.export.export(result.model, (x,))
        torch.export.save(exported, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        same = {
            "plan": plan.apply(model),
            "state_dict": again,
            "torch.export": loaded.module(),
        }
        for name, one in same.items():
            assert torch.equal(one(x), expected), name
    for compiled in (sepc.compile(result.model), sepc.compile(model, separate=plan), sepc.compile(loaded)):
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_separated_model_can_be_trained(result: sepc.Separation) -> None:
    result.model(smooth_images(2, size=28)).sum().backward()
    assert all(one.grad is not None for one in result.model.parameters())


def test_models_of_several_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.target.Target.is_runnable", property(lambda self: False))
    monkeypatch.setattr(menus, "RANKS", 2)
    images, masks = smooth_images(24, size=28), torch.rand(24, 1, 28, 28).round()
    loader = [(images[:12], masks[:12], "labels"), (images[12:], masks[12:], "labels")]
    found = sepc.separate(
        TwoInputs().eval(), calibration=loader, speedup=1.2, forms=("channels",), steps=1, distill_steps=2
    )
    assert found.plan.layers
    assert 0 < found.error < 1


@pytest.mark.parametrize("target", ["x86-64-v3", "arm64:cortex-a72"])
def test_plans_are_made_with_the_costs_of_the_target(model: nn.Module, target: str) -> None:
    job = job_for(target, model, smooth_images(1, size=28))
    machine = Target.parse(target).machine
    layer = next(one for one in job.found[0] if one.path == "3.first")
    option = Option("channels", 16)
    factors = FORMS["channels"].factors(layer.geometry, 16)
    assert job.layer_us(layer, option) == sequence_us(factors, (1, 64, 28, 28), machine, 1)
    assert job.layer_us(layer, AS_IT_WAS) == sequence_us((layer.geometry,), (1, 64, 28, 28), machine, 1)


def test_targets_have_plans_of_their_own(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the best plan on one machine takes another time, by that machine's costs, on the other."""
    monkeypatch.setattr(menus, "RANKS", 3)
    plans = {}
    for target in ("x86-64-v3", "arm64:cortex-a72"):
        job = job_for(target, model, smooth_images(1, size=28))
        found = menus.menus(job)
        choices = frontier(found, sum(job.dense_times_us[path] for path in found))
        choice = next(one for one in choices if job.predicted_for(one) * 1.5 <= job.dense_us)
        assert job.dense_us / job.predicted_for(choice) >= 1.5
        plans[target] = {path: one.time_us for path, one in choice.chosen.items()}
    one, other = plans.values()
    assert one.keys() == other.keys()
    assert all(other[path] > 2 * one[path] for path in one), "a Cortex-A72 is far slower"


def test_memory_that_is_kept_changes_nothing_but_time(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.target.Target.is_runnable", property(lambda self: False))
    monkeypatch.setattr(menus, "RANKS", 2)
    images = smooth_images(128, size=28)
    weights = []
    for kept_bytes in (1 << 30, 0):
        found = sepc.separate(
            model, calibration=images, speedup=1.3, forms=("channels",), steps=1, kept_bytes=kept_bytes
        )
        weights.append(torch.cat([factor.flatten() for row in found.plan.layers.values() for factor in row.factors]))
    assert torch.equal(*weights)
