"""Fits find what is there, are never worse than truncated singular value decompositions, and know the metric."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sepc.separable.fit import compose, fit
from sepc.separable.forms import FORMS
from sepc.separable.geometry import Geometry

SHAPES = {
    "plain": Geometry(12, 10, (3, 3), (1, 1), (1, 1), (1, 1)),
    "groups": Geometry(8, 12, (3, 3), (1, 1), (1, 1), (1, 1), groups=2),
    "1-D": Geometry(9, 8, (5,), (1,), (2,), (1,)),
    "3-D": Geometry(4, 6, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
}
RANKS = {"bottleneck": 8, "depthwise-pointwise": 2, "pointwise-depthwise": 2, "spatial": 4, "channels": 3}
RANKS |= {"input-channels": 3, "output-channels": 3}
CASES = [(form, shape) for form in FORMS for shape in SHAPES if FORMS[form].full_rank(SHAPES[shape])]


def random_metric(whole: Geometry, generator: torch.Generator) -> torch.Tensor:
    """A covariance of patches in which few directions matter, as in images."""
    size = whole.group_inputs * whole.taps
    mixed = torch.randn(whole.groups, size, size, generator=generator) * torch.logspace(0, -2, size)
    return mixed @ mixed.transpose(1, 2)


def square(weight: torch.Tensor, metric: torch.Tensor | None, groups: int) -> float:
    rows = weight.double().flatten(1).reshape(groups, -1, weight[0].numel())
    return float((rows * (rows if metric is None else rows @ metric.double())).sum())


def truncated(form: str, weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The sum of the largest components of the matrices that the form is about, as textbooks have it."""
    outputs, inputs = weight.shape[:2]

    def largest(matrix: torch.Tensor) -> torch.Tensor:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :]

    order: dict[str, tuple[int, ...]] = {
        "depthwise-pointwise": (1, 0, 2),
        "pointwise-depthwise": (0, 1, 2),
        "input-channels": (1, 0, 2),
        "output-channels": (0, 1, 2),
    }
    if form in order:
        matrices = weight.flatten(2).permute(order[form])  # Its own inverse.
        batched = matrices if "depthwise" in form else matrices.flatten(1)
        return largest(batched).reshape(matrices.shape).permute(order[form]).reshape(weight.shape)
    if form == "spatial":
        parts = weight.reshape(outputs, inputs, weight.shape[2], -1).permute(1, 2, 0, 3)
        matrix = largest(parts.flatten(2).flatten(0, 1))
        return matrix.reshape(parts.shape).permute(2, 0, 1, 3).reshape(weight.shape)
    if form == "channels":
        spread = torch.linalg.svd(weight.transpose(0, 1).flatten(1))[0][:, :rank]
        gather = torch.linalg.svd(weight.flatten(1))[0][:, : math.ceil(rank * outputs / inputs)]
        return torch.einsum("os,ps,pj...,jr,ir->oi...", gather, gather, weight, spread, spread)
    left, values, right = torch.linalg.svd(weight.flatten(2), full_matrices=False)
    smallest = values.flatten().sort(descending=True).values[rank - 1]
    return (left * (values * (values >= smallest))[:, None] @ right).reshape(weight.shape)


@pytest.mark.parametrize(("form", "shape"), CASES)
@pytest.mark.parametrize("has_metric", [False, True])
def test_no_fit_is_worse_than_truncated_singular_values(form: str, shape: str, has_metric: bool) -> None:
    whole, generator = SHAPES[shape], torch.Generator().manual_seed(1)
    rank = min(RANKS[form], FORMS[form].full_rank(whole) - 1)
    weight = torch.randn(whole.weight_shape, generator=generator)
    metric = random_metric(whole, generator) if has_metric else None
    plain = torch.cat([truncated(form, part, rank) for part in weight.chunk(whole.groups)])
    whole_square = square(weight, metric, whole.groups)
    baseline = math.sqrt(square(weight - plain, metric, whole.groups) / whole_square)
    closed, descended = (fit(FORMS[form], whole, rank, weight, metric, steps=steps) for steps in (0, 30))
    assert closed.error <= baseline * (1 + 1e-6)
    assert descended.error <= closed.error * (1 + 1e-4)
    if has_metric:
        assert descended.error < 0.9 * baseline, "the metric is worth something"
    found = square(weight - descended.weight, metric, whole.groups) / whole_square
    assert descended.square_error == pytest.approx(found, rel=1e-3), "the error is that of the weight"


@pytest.mark.parametrize(("form", "shape"), CASES)
@pytest.mark.parametrize("has_metric", [False, True])
def test_a_planted_form_is_found(form: str, shape: str, has_metric: bool) -> None:
    whole, generator = SHAPES[shape], torch.Generator().manual_seed(2)
    rank = 3 if form == "bottleneck" else min(RANKS[form], FORMS[form].full_rank(whole) - 1)
    factors = [torch.randn(one.weight_shape, generator=generator) for one in FORMS[form].factors(whole, rank)]
    weight = compose(FORMS[form], whole, factors)
    metric = random_metric(whole, generator) if has_metric else None
    assert fit(FORMS[form], whole, rank, weight, metric, steps=0).error < 1e-5


def test_more_steps_and_more_rank_come_nearer() -> None:
    whole, generator = SHAPES["plain"], torch.Generator().manual_seed(3)
    weight, metric = torch.randn(whole.weight_shape, generator=generator), random_metric(whole, generator)
    by_steps = [fit(FORMS["bottleneck"], whole, 8, weight, metric, steps=steps).error for steps in (0, 5, 40)]
    by_rank = [fit(FORMS["bottleneck"], whole, rank, weight, metric).error for rank in (4, 8, 16, 32)]
    assert by_steps == sorted(by_steps, reverse=True)
    assert by_rank == sorted(by_rank, reverse=True)


@pytest.mark.parametrize("form", FORMS)
def test_dead_inputs_and_dead_weights_do_no_harm(form: str) -> None:
    whole, generator = SHAPES["plain"], torch.Generator().manual_seed(4)
    weight, metric = torch.randn(whole.weight_shape, generator=generator), random_metric(whole, generator)
    metric[:, :9] = 0
    metric[:, :, :9] = 0
    weight[:3] = 0
    for given in (weight, torch.zeros_like(weight)):
        found = fit(FORMS[form], whole, RANKS[form], given, metric, steps=10)
        assert all(bool(factor.isfinite().all()) for factor in found.factors)
        assert 0 <= found.error < 1
    assert float(found.weight.abs().max()) == 0


def test_the_same_seed_gives_the_same_fit() -> None:
    whole = SHAPES["plain"]
    weight = torch.randn(whole.weight_shape)
    first, again, other = (fit(FORMS["bottleneck"], whole, 8, weight, seed=seed, steps=5) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_factors_are_of_like_size() -> None:
    whole = SHAPES["plain"]
    found = fit(FORMS["bottleneck"], whole, 8, 1e-6 * torch.randn(whole.weight_shape), steps=5)
    sizes = [float(factor.square().mean().sqrt()) for factor in found.factors]
    assert max(sizes) == pytest.approx(min(sizes), rel=1e-3)


@pytest.mark.parametrize("taps", [1, 3])
def test_few_output_channels_are_those_of_the_largest_variance(taps: int) -> None:
    """By the theorem of Eckart and Young, in the metric: no factors come nearer."""
    form, rank = FORMS["output-channels"], 3
    whole = Geometry.of(nn.Conv2d(6, 8, taps))
    weight = torch.randn(whole.weight_shape, dtype=torch.float64)
    root = torch.randn(1, 6 * taps * taps, 6 * taps * taps, dtype=torch.float64)
    found = fit(form, whole, rank, weight, root @ root.transpose(1, 2), steps=0)
    squares = torch.linalg.svdvals(weight.flatten(1) @ root[0]).square()
    assert found.square_error == pytest.approx(float(squares[rank:].sum() / squares.sum()))
