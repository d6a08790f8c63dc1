"""Distillation brings a model nearer to its original, never farther away, and keeps the best when it is interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import nn

from sepc.errors import ModelError
from sepc.separable.calibrated import Option, fit_weights
from sepc.separable.layers import find_layers
from sepc.separable.plan import Plan
from sepc.separation import distill as module
from sepc.separation.data import Inputs, training_batches
from sepc.separation.distill import Distillation, distill, rate_share
from tests.separable.networks import graph_of, network, smooth_images

STEPS = 40


@pytest.fixture
def model() -> nn.Module:
    return network().requires_grad_(False)


def crude(model: nn.Module) -> tuple[Plan, dict[str, torch.Tensor]]:
    """A plan that is far off, and the scales of its layers."""
    graph_module = graph_of(model, smooth_images(2))
    layers = [one for one in find_layers(model, graph_module)[0] if one.path.startswith("3.")]
    plan = Plan({one.path: fit_weights(one, Option("channels", 4), graph_module, 0, 0) for one in layers})
    return plan, {one.path: one.scale for one in layers}


def run(
    model: nn.Module, plan: Plan, scales: dict[str, torch.Tensor], batches: Iterator[Inputs] | None = None
) -> tuple[Plan, Distillation]:
    images = smooth_images(144)
    held_out = [(images[:16],)]
    batches = batches or training_batches(images, 16, 1, torch.Generator().manual_seed(0))
    return distill(model, plan, scales, held_out, batches, STEPS, seed=0)


def error(plan: Plan, model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((plan.apply(model)(x) - model(x)).norm() / model(x).norm())


def test_the_model_comes_nearer_to_its_original(model: nn.Module) -> None:
    plan, scales = crude(model)
    found, report = run(model, plan, scales)
    before, after = report.error
    assert after < 0.7 * before
    assert error(found, model, x := smooth_images(64)) < 0.8 * error(plan, model, x)
    assert (report.steps, report.interrupted) == (STEPS, False)
    assert str(report).startswith("40 steps in ")
    assert found.layers.keys() == plan.layers.keys()
    assert "8.weight" in found.weights, "the other layers are trained as well"


def test_the_error_told_is_that_of_the_result_on_what_was_held_out(model: nn.Module) -> None:
    torch.manual_seed(5)
    plan, scales = crude(model)
    torch.manual_seed(6)
    found, report = run(model, plan, scales)
    torch.manual_seed(6)
    x = smooth_images(144)[:16]
    with torch.no_grad():
        expected, actual = model(x), found.apply(model)(x)
    deviation = (expected - expected.mean(0)).square().mean()
    assert report.error[1] == pytest.approx(float(((actual - expected).square().mean() / deviation).sqrt()), rel=1e-3)


def test_nothing_of_the_callers_changes(model: nn.Module) -> None:
    plan, scales = crude(model)
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    factors = [one.clone() for row in plan.layers.values() for one in row.factors]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    batches = training_batches(torch.ones(32, 3, 12, 12).cumsum(0), 0, 1, torch.Generator())
    distill(model, plan, scales, [(torch.ones(4, 3, 12, 12).cumsum(0),)], batches, 2, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    assert all(map(torch.equal, factors, (one for row in plan.layers.values() for one in row.factors)))
    assert not any(one._forward_hooks for one in model.modules())
    assert model[0].weight.is_contiguous()


def test_the_same_seed_gives_the_same_weights(model: nn.Module) -> None:
    plan, scales = crude(model)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(run(model, plan, scales)[0])
    assert all(torch.equal(one, found[1].weights[name]) for name, one in found[0].weights.items())


def test_a_loader_shuffles_by_the_seed(model: nn.Module) -> None:
    plan, scales = crude(model)
    images = smooth_images(64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 16, shuffle=True)
    weights = []
    for seed in (0, 0, 1):
        batches = training_batches(loader, 8, 1, torch.Generator())
        weights.append(distill(model, plan, scales, [(images[:8],)], batches, 6, seed)[0].weights["8.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_makes_it_worse_is_not_kept(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RATE", 1000.0)
    plan, scales = crude(model)
    found, report = run(model, plan, scales)
    assert report.error[0] == report.error[1]
    x = smooth_images(8)
    assert error(found, model, x) == pytest.approx(error(plan, model, x))


def test_data_that_is_not_finite_does_no_harm(model: nn.Module) -> None:
    plan, scales = crude(model)
    images = smooth_images(16)
    batches = iter([(images,), (images * float("inf"),)] * (STEPS // 2))
    found, report = distill(model, plan, scales, [(images,)], batches, STEPS, seed=0)
    assert report.error[1] < report.error[0]
    assert all(bool(one.isfinite().all()) for one in found.weights.values())


@pytest.mark.parametrize("at_step", [0, 1, 30])
def test_an_interruption_gives_the_best_so_far(model: nn.Module, at_step: int) -> None:
    plan, scales = crude(model)

    def batches() -> Iterator[Inputs]:
        yield from islice(training_batches(smooth_images(64), 0, 1, torch.Generator()), at_step)
        raise KeyboardInterrupt

    found, report = run(model, plan, scales, batches())
    assert report.interrupted
    assert report.steps == at_step
    assert ", interrupted: " in str(report)
    assert (report.error[1] < report.error[0]) == (at_step == 30)
    x = smooth_images(64)
    assert error(found, model, x) <= error(plan, model, x) * 1.001


def test_a_signal_is_an_interruption() -> None:
    """Of the operating system, in a process of its own, in the middle of a step."""
    program = """
        import signal, torch
        from torch import nn
        from sepc.separable.plan import Plan
        from sepc.separation.distill import distill
        # In the background of a shell, tests begin with the signal ignored, and their children as well.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        model = nn.Sequential(nn.Linear(4, 4)).eval()
        plan = Plan({}, {"0.bias": torch.ones(4)})
        def batches():
            while True:
                print("step", flush=True)
                yield (torch.randn(8, 4),)
        plan, report = distill(model, plan, {}, [(torch.randn(8, 4),)], batches(), 10**9, 0)
        print("interrupted", report.interrupted, report.error[1] <= report.error[0], flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for _ in range(5):
                assert process.stdout.readline() == "step\n"
            process.send_signal(signal.SIGINT)
            lines = process.communicate(timeout=60)[0].splitlines()
        finally:
            process.kill()
    assert lines[-1] == "interrupted True True"
    assert process.returncode == 0


def test_views_that_want_pixels_in_rows_are_left_so() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.last = nn.Linear(8 * 16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values: torch.Tensor = self.conv(x)
            return self.last(values.view(len(values), -1))

    model = Flat().eval()
    graph_module = graph_of(model, x := smooth_images(16, size=6))
    (layer,), _ = find_layers(model, graph_module)
    plan = Plan({"conv": fit_weights(layer, Option("channels", 1), graph_module, 0, 0)})
    _, report = distill(model, plan, {"conv": layer.scale}, [(x,)], iter([(x,)] * STEPS), STEPS, seed=0)
    assert report.error[1] < report.error[0]


def test_a_model_without_gradients_is_refused() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).detach()

    x = smooth_images(4)
    with pytest.raises(ModelError, match="has no gradients"):
        distill(Rounded().eval(), Plan(), {}, [(x,)], iter([(x,)]), 1, seed=0)


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_share(step, 100) for step in range(100)]
    assert rates[0] < rates[3] < rates[5]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01
