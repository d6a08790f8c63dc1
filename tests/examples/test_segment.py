"""The example of segmentation: its separable pyramid has no dense atrous layer, and both networks are PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples import segment as example


def atrous(model: nn.Module) -> list[tuple[int, int]]:
    """Groups and dilation of the atrous layers."""
    convolutions = [one for one in model.modules() if isinstance(one, nn.Conv2d)]
    return [(one.groups, one.dilation[0]) for one in convolutions if one.dilation != (1, 1)]


def test_the_separable_pyramid_has_the_rates_of_the_dense_one_in_depthwise_layers() -> None:
    dense, separable = (atrous(example.network(separable=one)) for one in (False, True))
    assert dense[-3:] == [(1, 12), (1, 24), (1, 36)]
    assert separable == [*dense[:-3], (960, 12), (960, 24), (960, 36)]


def test_a_separable_layer_gives_what_has_the_shape_of_the_dense_one() -> None:
    dense = nn.Conv2d(8, 12, 3, padding=6, dilation=6)
    x = torch.randn(1, 8, 20, 17)
    assert example.atrous_separable(dense)(x).shape == dense(x).shape


@pytest.mark.slow
def test_it_compares_both_networks(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--size", "64", "--rounds", "1"]) == 0
    output = capsys.readouterr().out
    assert output.count("they agree") == 2
    assert [f"{kind} 960 → {out}, dilation 36" in output for kind, out in (("dense", 256), ("depthwise", 960))] == [
        True,
        True,
    ]
