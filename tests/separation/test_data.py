"""Calibration data comes in many shapes, and leaves in batches of one size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepc.errors import InputError
from sepc.separation.data import BATCH, Source, count_inputs, held_out, in_batches, training_batches
from tests.helpers import Function

DATA = torch.arange(200.0).reshape(200, 1)
OTHER = -DATA


class Counted(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + y * scale


def test_inputs_of_a_model_are_counted() -> None:
    assert count_inputs(nn.Sequential(nn.ReLU()), None) == 1
    assert count_inputs(Counted(), None) == 2
    assert count_inputs(Counted(), (DATA, OTHER, DATA)) == 3
    assert count_inputs(Function(lambda self, *several: several[0]), None) == 1


@pytest.mark.parametrize(
    "source",
    [DATA, [DATA[:70], DATA[70:]], DataLoader(TensorDataset(DATA, OTHER), batch_size=30)],
    ids=["tensor", "list", "loader"],
)
def test_the_first_inputs_are_taken_in_batches_of_one_size(source: Source) -> None:
    batches = in_batches(source, 150)
    assert [len(one[0]) for one in batches] == [BATCH, BATCH]
    assert torch.equal(torch.cat([one[0] for one in batches]), DATA[: 2 * BATCH])
    assert all(len(one) == 1 for one in batches), "labels are left out"


def test_several_inputs_stay_together() -> None:
    batches = in_batches([(DATA[:100], OTHER[:100], "label"), (DATA[100:], OTHER[100:], "label")], 128, count=2)
    assert all(torch.equal(one, -other) for one, other in batches)
    assert sum(len(one) for one, _ in batches) == 128


def test_a_quarter_is_held_out_and_never_trained_with() -> None:
    judges = torch.cat([one[0] for one in held_out(in_batches(DATA, 128))])
    assert torch.equal(judges, DATA[:32])
    for source in (DATA, [DATA[:20], DATA[20:]]):
        seen = torch.cat([one[0] for one in islice(training_batches(source, 32, 1, torch.Generator()), 12)])
        assert set(seen.flatten().tolist()) == set(DATA[32:].flatten().tolist())
        assert len(seen) > 2 * len(DATA[32:]), "time and again"


@pytest.mark.parametrize(
    ("source", "count", "message"),
    [
        ([DATA], 2, "a batch has 1 tensors, and the model takes 2"),
        ([(DATA, OTHER[:5])], 2, "different lengths"),
        ([[]], 1, "there is a list"),
        ([torch.ones(3)], 1, "one has no batch"),
        ([], 1, "There is no calibration data"),
    ],
)
def test_what_is_no_input_is_refused(source: Sequence[object], count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        in_batches(source, 64, count)


def test_too_little_to_distil_with_is_refused() -> None:
    with pytest.raises(InputError, match="too little calibration data to distil with"):
        next(training_batches(DATA[:10], 10, 1, torch.Generator()))
