"""Moments from patches are those of the patches, and what is read off them is what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sepc.separable.geometry import Geometry, Layer
from sepc.separable.statistics import Sampler, Statistics

CASES = (
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
    nn.Conv2d(4, 6, (3, 1), padding=(0, 1), groups=2),
    nn.Conv1d(4, 3, 5, stride=2),
    nn.Conv3d(2, 3, (1, 2, 3), padding=1),
)


def gathered(layer: Layer, batches: list[torch.Tensor], noise: float = 0.0) -> Statistics:
    """The moments of `batches` with what `layer` makes of them, and noise."""
    sampler = Sampler(
        Geometry.of(layer), sum(map(len, batches)), tuple(batches[0].shape[2:]), torch.Generator().manual_seed(0)
    )
    for batch in batches:
        places = sampler.places()
        with torch.no_grad():
            results = layer(batch)
        results = results + noise * torch.randn(results.shape)
        sampler.add(batch, results.flatten(2)[:, :, places], places)
    return sampler.statistics()


def images(layer: Layer) -> list[torch.Tensor]:
    return [5 + torch.randn(10, layer.in_channels, *[9] * (layer.weight.dim() - 2)) for _ in range(3)]


@pytest.mark.parametrize("layer", CASES, ids=str)
def test_the_moments_tell_what_the_layer_does(layer: Layer) -> None:
    found = gathered(layer, images(layer))
    weight = layer.weight.detach().double()
    rows = weight.reshape(layer.groups, -1, weight[0].numel())
    torch.testing.assert_close(found.cross, rows @ found.covariance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.bias(weight), layer.bias.detach().double(), rtol=1e-3, atol=1e-3)
    assert found.error(weight) < 5e-3, "rounding of squares"
    assert found.error(torch.zeros_like(weight)) == pytest.approx(1)
    torch.testing.assert_close(found.best_weight(weight), weight, rtol=1e-3, atol=1e-3)
    # From nothing it is found by regression, up to the ridge.
    assert found.error(found.best_weight(torch.zeros_like(weight))) < 0.02


def test_the_covariance_is_that_of_all_patches_where_all_are_taken() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    batches = images(layer)
    found = gathered(layer, batches)
    patches = nn.functional.unfold(torch.cat(batches).double(), 3, padding=1).movedim(1, 2).flatten(0, 1)
    torch.testing.assert_close(found.covariance[0], torch.cov(patches.T, correction=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.patch_mean[0], patches.mean(0), rtol=1e-5, atol=1e-5)


def test_the_error_is_that_of_the_results() -> None:
    layer, batches = CASES[0], images(CASES[0])
    found = gathered(layer, batches)
    other = layer.weight.detach() + 0.1 * torch.randn_like(layer.weight)
    with torch.no_grad():
        x = torch.cat(batches)
        expected = layer(x)
        off = nn.functional.conv2d(x, other, found.bias(other.double()).float(), padding=1) - expected
    spread = (expected - expected.mean((0, 2, 3), keepdim=True)).square().sum()
    assert found.error(other) == pytest.approx(float((off.square().sum() / spread).sqrt()), rel=1e-3)


def test_noise_that_no_weight_explains_is_an_error() -> None:
    layer = CASES[0]
    assert gathered(layer, images(layer), noise=1.0).error(layer.weight.double()) > 0.3


def test_dead_inputs_do_no_harm() -> None:
    layer = CASES[0]
    batches = [batch * torch.tensor([0.0, 1, 1, 1]).reshape(1, 4, 1, 1) for batch in images(layer)]
    found = gathered(layer, batches)
    assert bool((torch.linalg.eigvalsh(found.metric()) > 0).all())
    torch.testing.assert_close(found.best_weight(layer.weight), layer.weight.double(), rtol=1e-3, atol=1e-3)
    nothing = gathered(layer, [0 * batch for batch in batches])
    assert bool(nothing.best_weight(layer.weight).isfinite().all())
    assert nothing.error(layer.weight) >= 0


def test_a_sample_is_taken_of_large_images() -> None:
    sampler = Sampler(Geometry.of(nn.Conv2d(2, 2, 3)), 4, (100, 100), torch.Generator().manual_seed(0))
    places = sampler.places()
    assert len(places) == len(set(places.tolist())) == 1024
    assert int(places.max()) < 98 * 98
