"""Every form is a sequence of layers that computes the product of its factors, and can be any weight at full rank."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sepc.separable.fit import compose, fit
from sepc.separable.forms import FORMS, Form
from sepc.separable.geometry import LAYERS, Geometry, Layer

LAYERS_TO_REPLACE = (
    nn.Conv2d(6, 4, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(3, 5, 3, padding=2, dilation=2),
    nn.Conv2d(4, 4, (3, 5), (2, 1), (0, 2)),
    nn.Conv2d(8, 12, 3, padding=1, groups=2),
    nn.Conv2d(4, 3, 3, padding="same", dilation=3),
    nn.Conv2d(4, 3, 4, padding="valid"),
    nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 3, 5, padding=2, padding_mode="circular"),
    nn.Conv1d(4, 6, 5, stride=2, padding=2),
    nn.Conv3d(3, 4, 3, (1, 2, 1), 1),
    nn.Conv3d(2, 4, (3, 1, 3), padding=(1, 0, 1), groups=2),
)


CASES = [(layer, form) for layer in LAYERS_TO_REPLACE for form in FORMS.values() if form.full_rank(Geometry.of(layer))]


def images(layer: Layer, size: int = 11) -> torch.Tensor:
    return torch.randn(2, layer.in_channels, *[size] * (layer.weight.dim() - 2))


@pytest.mark.parametrize(("layer", "form"), CASES, ids=lambda one: getattr(one, "name", str(one)))
def test_at_full_rank_the_layers_compute_what_the_convolution_does(layer: Layer, form: Form) -> None:
    whole, x = Geometry.of(layer), images(layer)
    rank = form.full_rank(whole)
    found = fit(form, whole, rank, layer.weight, steps=0)
    assert found.error < 1e-6
    torch.testing.assert_close(found.weight, layer.weight.detach().double(), rtol=0, atol=1e-6)
    with torch.no_grad():
        built = form.build(whole, rank, [factor.float() for factor in found.factors], layer.bias)
        torch.testing.assert_close(built(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "form"), CASES, ids=lambda one: getattr(one, "name", str(one)))
def test_layers_of_any_factors_compute_their_product(layer: Layer, form: Form) -> None:
    whole, x = Geometry.of(layer), images(layer)
    rank = min(2, form.full_rank(whole))
    factors = [torch.randn(one.weight_shape) for one in form.factors(whole, rank)]
    built = form.build(whole, rank, factors, None)
    dense = whole.layer(compose(form, whole, factors), None)
    with torch.no_grad():
        torch.testing.assert_close(built(x), dense(x), rtol=1e-4, atol=1e-4)
    assert built(x).shape[2:] == whole.output_size(x.shape[2:])


@pytest.mark.parametrize(("layer", "form"), CASES, ids=lambda one: getattr(one, "name", str(one)))
def test_multiply_adds_are_those_of_the_layers(layer: Layer, form: Form) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    whole, x = Geometry.of(layer), images(layer)
    rank = min(2, form.full_rank(whole))
    factors = [torch.randn(one.weight_shape) for one in form.factors(whole, rank)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        form.build(whole, rank, factors, None)(x[:1])
    assert form.multiply_adds(whole, rank, x.shape[2:]) == counter.get_total_flops() // 2


def test_only_the_last_layer_has_a_bias() -> None:
    """One before the taps would be padded with zeros."""
    whole = Geometry.of(LAYERS_TO_REPLACE[0])
    for form in FORMS.values():
        factors = [torch.randn(one.weight_shape) for one in form.factors(whole, 2)]
        biases = [layer.bias is not None for layer in form.build(whole, 2, factors, torch.randn(4))]
        assert biases == [False] * (len(biases) - 1) + [True]


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.Conv2d(4, 4, 1), ("output-channels",)),
        (nn.Conv2d(4, 1, 1), ()),
        (nn.Conv2d(4, 4, 3, groups=4), ("spatial",)),
        (nn.Conv1d(4, 4, 3), tuple(name for name in FORMS if name != "spatial")),
        (nn.Conv2d(4, 4, (1, 3)), tuple(name for name in FORMS if name != "spatial")),
        (nn.Conv2d(4, 4, 3), tuple(FORMS)),
    ],
)
def test_forms_are_offered_where_they_make_sense(layer: Layer, names: tuple[str, ...]) -> None:
    assert tuple(name for name, form in FORMS.items() if form.full_rank(Geometry.of(layer))) == names


@pytest.mark.parametrize("layer", LAYERS_TO_REPLACE, ids=str)
def test_a_geometry_makes_the_layer_that_it_was_read_from(layer: Layer) -> None:
    x, made = images(layer), Geometry.of(layer).layer(layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.equal(made(x), layer(x))
    assert type(made) is LAYERS[layer.weight.dim() - 3]
    assert Geometry.of(layer).taps == math.prod(layer.kernel_size)
