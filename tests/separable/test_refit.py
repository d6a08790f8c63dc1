"""Layers that stay make up for those that were replaced: which, how much, and what they are called in a plan."""

from __future__ import annotations

import torch
from torch import nn

import sepc
from sepc.separable.calibrated import Option, fit_in_turn
from sepc.separable.layers import find_layers
from sepc.separable.plan import Plan
from sepc.separable.refit import MOST_ENTRIES, find_kept
from sepc.separable.twins import Twins
from tests.helpers import with_statistics
from tests.separable.networks import Block, graph_of, network, smooth_images

POOR = {"3.first": Option("channels", 4)}


def plan_for(model: nn.Module, options: dict[str, Option], images: int = 128, *, refitted: bool = True) -> Plan:
    """A plan by so many images, in which layers that stay are fitted as well, or are not."""
    torch.manual_seed(0)
    batches = [smooth_images(32) for _ in range(images // 32)]
    graph_module = graph_of(model, batches[0])
    layers, _ = find_layers(model, graph_module)
    rest = {one.path: one for one in layers if one.path not in options}
    kept = find_kept(model, graph_module, rest) if refitted else []
    twins = Twins(graph_module, [(one,) for one in batches])
    with torch.no_grad():
        return fit_in_turn(twins, layers, graph_module, options, 10, 0, kept)


def error(plan: Plan, model: nn.Module) -> float:
    """On images that nothing was fitted to."""
    x = smooth_images(256)
    with torch.no_grad():
        expected, actual = model(x), plan.apply(model)(x)
    return float((actual - expected).norm() / (expected - expected.mean(0)).norm())


def test_they_bring_the_results_nearer_on_images_that_they_were_not_fitted_to() -> None:
    torch.manual_seed(1)
    model = network()
    assert error(plan_for(model, POOR), model) < 0.9 * error(plan_for(model, POOR, refitted=False), model)


def test_those_behind_a_replaced_layer_are_fitted_and_no_others() -> None:
    plan = plan_for(network(), POOR)
    behind = ("3.second", "4", "8")
    assert plan.weights.keys() == {f"{path}.{name}" for path in behind for name in ("weight", "bias")}
    assert not plan_for(network(), {}).weights


class Normalized(nn.Module):
    """A block whose second normalised convolution stays, between layers without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.other_norm = nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.other_norm(self.second(torch.relu(self.norm(self.first(x)))))
        return result


def test_the_bias_may_be_that_of_the_normalisation() -> None:
    torch.manual_seed(2)
    model = with_statistics(Normalized())
    poor = {"first": Option("channels", 2)}
    plan = plan_for(model, poor)
    assert plan.weights.keys() == {"second.weight", "other_norm.bias"}
    assert error(plan, model) < 0.98 * error(plan_for(model, poor, refitted=False), model)


def test_means_are_right_behind_a_layer_that_was_fitted() -> None:
    torch.manual_seed(2)
    model = with_statistics(Normalized())
    plan = plan_for(model, {"first": Option("channels", 1)}, images=512)
    x = smooth_images(512)
    with torch.no_grad():
        means = [one(x).mean((0, 2, 3)) for one in (model, plan.apply(model))]
    torch.testing.assert_close(means[1], means[0], atol=0.05 * float(model(x).std()), rtol=0)


class Shared(nn.Module):
    """A linear layer that is called twice, and one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.twice, self.bare = Block(3), nn.Linear(12, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.bare(self.twice(self.twice(self.block(x))))
        return result


def test_layers_that_share_parameters_or_have_no_bias_stay_as_they_were() -> None:
    model = with_statistics(Shared())
    graph_module = graph_of(model, smooth_images(2))
    assert not find_kept(model, graph_module, {})


def test_layers_of_very_many_inputs_stay_as_they_were() -> None:
    sizes = (MOST_ENTRIES // 64, MOST_ENTRIES // 64 + 1)
    models = [nn.Sequential(nn.Conv2d(3, size, 3), nn.MaxPool2d(1), nn.Flatten()) for size in sizes]
    for model, size, count in zip(models, sizes, (1, 0), strict=True):
        model.append(nn.Linear(64 * size, 2))
        assert len(find_kept(model, graph_of(model, torch.randn(2, 3, 10, 10)), {})) == count


def test_a_linear_layer_over_several_places_is_fitted() -> None:
    torch.manual_seed(3)
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(100, 20)))
    poor = {"0": Option("channels", 1)}
    plan = plan_for(model, poor, images=256)
    assert plan.weights.keys() == {"3.weight", "3.bias"}
    assert error(plan, model) < error(plan_for(model, poor, images=256, refitted=False), model)


def test_with_few_samples_weights_stay_near_to_what_they_were() -> None:
    model = network()
    before = model[8].weight.detach()
    few, many = (plan_for(model, POOR, images=count).weights["8.weight"] for count in (32, 1024))
    assert float((few - before).norm()) < float((many - before).norm()) < float(before.norm())


def test_the_model_and_its_plan_have_the_fitted_weights() -> None:
    model, images = network(), smooth_images(64)
    result = sepc.separate(model, calibration=images, max_error=0.5, num_threads=1, steps=4)
    assert result.plan.layers
    assert result.plan.weights
    state = dict(result.model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in result.plan.weights.items())
    x = smooth_images(2)
    with torch.no_grad():
        compiled = sepc.compile(model, separate=result.plan, num_threads=1)
        torch.testing.assert_close(compiled(x), result.model(x), rtol=1e-3, atol=1e-3)
