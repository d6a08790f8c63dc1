"""Arguments of every kind: what eager takes is right, and anything else is one clear error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from tests.soak.compute import VALUES, VIEWS, unusual_inputs


def test_views_and_values_of_every_kind_are_right(tmp_path: Path) -> None:
    outcome = unusual_inputs(0, tmp_path)
    assert not outcome.wrong
    assert outcome.counts["unusual inputs"] == len(VIEWS) * len(VALUES)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_where_it_does_in_eager(value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.Sigmoid())
    x = torch.randn(2, 8, 9, 9)
    x[1, 2, 4, 4] = value
    found, expected = sepc.compile(model.eval(), num_threads=2)(x), model(x).detach()
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_inference_tensor_is_taken_outside_of_inference_mode() -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    with torch.inference_mode():
        x = torch.randn(1, 3, 8, 8)
    compiled = sepc.compile(model)
    torch.testing.assert_close(compiled(x), compiled(x.clone()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(1, 3, 8, 8, device="meta"),), "meta"),
        ((torch.randn(1, 3, 8, 8, dtype=torch.complex64),), "complex"),
        ((torch.randint(0, 9, (1, 3, 8, 8)),), "."),
        ((torch.randn(1, 3, 8, 8).double(),), "."),
        ((torch.randn(3, 8),), "."),
        ((torch.randn(1, 5, 8, 8),), "."),
        ((), "."),
        ((torch.randn(1, 3, 8, 8), torch.randn(1)), "."),
        ((object(),), "."),
        (("image",), "."),
        ((torch.randn(1, 3, 8, 8).to_sparse(),), "."),
        ((torch.randn(1, 3, 2, 2),), "."),
    ],
    ids=[
        "device",
        "complex",
        "integer",
        "double",
        "rank",
        "channels",
        "none",
        "two",
        "object",
        "text",
        "sparse",
        "small",
    ],
)
def test_what_does_not_fit_is_one_error_and_the_next_call_is_right(arguments: tuple[object, ...], message: str) -> None:
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8)
    for compiled in (sepc.compile(model), sepc.compile(model, example_inputs=(x,))):
        with pytest.raises(sepc.SepcError, match=message):
            compiled(*arguments)
        torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_loaded_model_refuses_what_does_not_fit(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    sepc.compile(nn.Conv2d(3, 4, 3).eval(), example_inputs=(x,)).save(tmp_path / "model.sepc")
    loaded = sepc.load(tmp_path / "model.sepc")
    for wrong in (x[0], x.double(), x.to("meta"), x[:, :, 1:], x.to_sparse()):
        with pytest.raises(sepc.InputError):
            loaded(wrong)
    with pytest.raises(sepc.InputError):
        loaded()
