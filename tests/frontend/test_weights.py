"""Whether weights are what they were: every sort of change, and tensors of every sort."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sepc.frontend.weights import Weights


def parameters() -> list[torch.Tensor]:
    return [nn.Parameter(torch.randn(40, 30)), nn.Parameter(torch.randn(7)), torch.randn(())]


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.add_(1),
        lambda weight: weight[3:4].zero_(),
        lambda weight: weight.data.mul_(1.01),
        lambda weight: weight.detach().numpy().fill(0.5),
        lambda weight: setattr(weight, "data", weight.data.clone()),
        lambda weight: setattr(weight, "data", weight.data.T),
    ],
)
def test_a_change_is_seen(change: Callable[[Any], Any]) -> None:
    tensors = parameters()
    weights = Weights(tensors, lambda: None)
    assert weights.hold(tensors)
    with torch.no_grad():
        change(tensors[0])
    assert not weights.hold(tensors)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((50,), torch.nan),
        torch.randn(0, 3),
        torch.randn(8, 9)[:, ::2],
        torch.randn(1, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(1, 40).expand(3, 40),
        torch.randn(60).to(torch.bfloat16),
        torch.arange(100) > 3,
        torch.randn(20, dtype=torch.complex64),
    ],
    ids=["nan", "empty", "gaps", "channels last", "expanded", "bfloat16", "bool", "complex"],
)
def test_tensors_of_every_sort_hold(tensor: torch.Tensor) -> None:
    weights = Weights([tensor], lambda: None)
    assert weights.hold([tensor])
    tensor[:1].fill_(1)
    assert not weights.hold([tensor])


def test_the_death_of_a_tensor_is_told() -> None:
    told: list[int] = []
    tensors = parameters()
    weights = Weights(tensors, lambda: told.append(1))
    assert weights.hold(tensors)
    del tensors[1]
    gc.collect()
    assert told == [1]
