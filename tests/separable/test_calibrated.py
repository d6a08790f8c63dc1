"""Fits in turn are better than those of weights alone, make up for earlier errors, and are exact where they can be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sepc.separable.calibrated import Option, fit_in_turn, fit_weights
from sepc.separable.forms import FORMS
from sepc.separable.layers import find_layers
from sepc.separable.plan import Plan
from sepc.separable.twins import Twins
from tests.separable.networks import graph_of, network, smooth_images

SEED = 0


def error(plan: Plan, model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected, actual = model(x), plan.apply(model)(x)
    return float((actual - expected).norm() / expected.norm())


def separated(options: dict[str, Option], steps: int = 20) -> tuple[nn.Module, Plan, Plan]:
    """A network, and two plans for it: of weights alone, and calibrated."""
    model, batches = network(), [smooth_images(32) for _ in range(4)]
    graph_module = graph_of(model, batches[0])
    layers, _ = find_layers(model, graph_module)
    chosen = [one for one in layers if one.path in options]
    plain = Plan({one.path: fit_weights(one, options[one.path], graph_module, steps, SEED) for one in chosen})
    twins = Twins(graph_module, [(one,) for one in batches])
    return model, plain, fit_in_turn(twins, layers, graph_module, options, steps, SEED)


@pytest.mark.parametrize("form", FORMS)
def test_calibration_is_worth_a_lot(form: str) -> None:
    rank = {"bottleneck": 12, "spatial": 8, "channels": 6}.get(form, 2)
    model, plain, calibrated = separated({path: Option(form, rank) for path in ("3.first", "3.second", "3.skip", "4")})
    x = smooth_images(64)
    assert error(calibrated, model, x) < 0.7 * error(plain, model, x)
    assert all(0 < one.error < 1 for one in calibrated.layers.values())


@pytest.mark.parametrize("form", FORMS)
def test_at_full_rank_nothing_changes(form: str) -> None:
    paths = ("0", "3.first", "3.second", "3.skip", "4")
    layers, _ = find_layers(model := network(), graph_of(model, smooth_images(2)))
    ranks = {one.path: FORMS[form].full_rank(one.geometry) for one in layers}
    model, plain, calibrated = separated({path: Option(form, ranks[path]) for path in paths}, steps=0)
    x = smooth_images(8)
    assert error(plain, model, x) < 1e-4
    assert error(calibrated, model, x) < 5e-3, "the ridge is all that differs"


def test_later_layers_make_up_for_earlier_ones() -> None:
    """A full-rank layer behind a poor one is fitted to the original's results, and so comes nearer than it was."""
    full = FORMS["channels"].full_rank(find_layers(m := network(), graph_of(m, smooth_images(2)))[0][2].geometry)
    model, _, calibrated = separated({"3.first": Option("channels", 4), "3.second": Option("channels", full)})
    alone = Plan({"3.first": calibrated.layers["3.first"]})
    assert error(calibrated, model, smooth_images(64)) < 0.95 * error(alone, model, smooth_images(64))


def test_a_summand_makes_up_for_the_other() -> None:
    """Of two parallel layers one is poor: with the sum as a target, the other one takes on a part of its error."""
    options = {"3.skip": Option("channels", 2)}
    model, batches = network(), [smooth_images(32) for _ in range(4)]
    graph_module = graph_of(model, batches[0])
    layers, _ = find_layers(model, graph_module)
    by_path = {one.path: one for one in layers}
    options["3.second"] = Option("channels", 16)
    ordered = [by_path["3.skip"], by_path["3.second"]]
    x = smooth_images(64)
    errors = []
    for skip in (by_path["3.second"].skip, None):
        own = [ordered[0], replace(ordered[1], skip=skip)]
        plan = fit_in_turn(Twins(graph_module, [(one,) for one in batches]), own, graph_module, options, 10, SEED)
        errors.append(error(plan, model, x))
    assert errors[0] < errors[1]
    assert not math.isnan(errors[0])


def test_the_scale_of_a_normalisation_decides_what_counts() -> None:
    model = network()
    with torch.no_grad():
        model[3].norm.weight[:8] *= 100
    graph_module = graph_of(model, smooth_images(2))
    layer = next(one for one in find_layers(model, graph_module)[0] if one.path == "3.first")
    found = fit_weights(layer, Option("spatial", 8), graph_module, 10, SEED)
    plan = Plan({"3.first": found})
    dense, built = model[3].first, plan.apply(model)[3].first
    with torch.no_grad():
        x = torch.randn(4, 16, 9, 9)
        off = (built(x) - dense(x)).square().mean((0, 2, 3)) / dense(x).square().mean((0, 2, 3))
    assert float(off[:8].mean()) < 0.5 * float(off[8:].mean())
