"""Which modules are layers that can be replaced, what follows each, and why others are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sepc.separable.geometry import Geometry
from sepc.separable.layers import find_layers, module_at
from tests.helpers import Function
from tests.separable.networks import graph_of, network, smooth_images

X = torch.randn(2, 8, 9, 9)


class Scaled(nn.Conv2d):
    """A convolution whose forward does more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_layers_are_found_in_order_with_what_follows_them() -> None:
    model = network()
    layers, left = find_layers(model, graph_of(model, smooth_images(2)))
    assert [one.path for one in layers] == ["0", "3.first", "3.second", "3.skip", "4"]
    assert left == {}
    stem, first, second, skip, last = layers
    norm = model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(stem.scale.float(), scale.detach())
    torch.testing.assert_close(stem.shift.float(), (norm.bias - norm.running_mean * scale).detach())
    assert torch.equal(last.scale, torch.ones(32, dtype=torch.float64))
    assert stem.result is not stem.node
    assert second.result is second.node
    assert first.skip is None
    assert (second.skip, skip.skip) == (skip.result, second.result)
    assert [one.image_size for one in layers] == [(12, 12)] * 5
    assert last.geometry == Geometry.of(model[4])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Function(lambda self, x: self.a(self.a(x)), a=nn.Conv2d(8, 8, 3)), "it is called 2 times"),
        (Function(lambda self, x: self.a(x), a=Scaled(8, 8, 3)), "it is a Scaled, whose forward may do more"),
        (Function(lambda self, x: self.a(x), a=nn.Conv2d(8, 1, 1)), "it has one channel"),
        (Function(lambda self, x: self.a(x), a=nn.Conv2d(8, 8, (1, 3), groups=8)), "it is depthwise"),
        (Function(lambda self, x: self.b(x), a=nn.Conv2d(8, 8, 3), b=nn.Conv2d(8, 1, 1)), "it is not called"),
        (
            Function(lambda self, x: nn.functional.conv2d(x, 2 * self.a.weight), a=nn.Conv2d(8, 8, 3)),
            "it is not called",
        ),
    ],
)
def test_what_is_no_layer_is_left_with_a_reason(model: nn.Module, reason: str) -> None:
    layers, left = find_layers(model, graph_of(model.eval(), X))
    assert [one.path for one in layers] == []
    assert reason in left["a"]


def test_modules_with_one_weight_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    model[2].weight = model[0].weight
    layers, left = find_layers(model, graph_of(model, X))
    assert not layers
    assert left == dict.fromkeys(("0", "2"), "its weight is shared by 0, 2")


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 6, 3, padding="same"), nn.Conv2d(8, 6, 3, padding_mode="reflect")])
def test_padding_of_its_own_is_found_in_the_graph(layer: nn.Conv2d) -> None:
    model = nn.Sequential(layer)
    layers, _ = find_layers(model, graph_of(model, X))
    assert layers[0].geometry.output_size(layers[0].image_size) == tuple(model(X).shape[2:])


def test_a_channel_with_next_to_no_scale_counts_a_little() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        model[1].weight[0] = 0
    layers, _ = find_layers(model, graph_of(model, X))
    assert 0 < float(layers[0].scale[0]) < 0.01


def test_channels_without_any_scale_count_alike() -> None:
    """As in residual branches whose last normalisation begins at zero."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    nn.init.zeros_(model[1].weight)
    layers, _ = find_layers(model, graph_of(model, X))
    assert torch.equal(layers[0].scale, torch.ones(8, dtype=torch.float64))


def test_a_module_that_is_none_is_told() -> None:
    with pytest.raises(LookupError, match="no module 'nothing'"):
        module_at(network(), "nothing")
    with pytest.raises(LookupError, match="'1' is BatchNorm2d"):
        module_at(network(), "1")
