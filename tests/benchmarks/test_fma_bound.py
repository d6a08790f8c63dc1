"""The bound of the multiply-adds: what is counted, what is timed, what is said."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from benchmarks import fma_bound, models


def test_multiply_adds_of_convolutions_and_products_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    model.append(nn.Linear(8 * 4, 5))
    assert fma_bound.count_multiply_adds(model, (torch.randn(1, 3, 4, 4),)) == 16 * 8 * 27 + 4 * 8 * 9 + 32 * 5


def test_the_loop_takes_as_long_as_it_has_multiply_adds() -> None:
    loop = fma_bound.multiply_add_loop(8)

    def least_s(multiply_adds: int) -> float:
        samples = []
        for _ in range(5):
            start_s = time.perf_counter()
            loop(multiply_adds)
            samples.append(time.perf_counter() - start_s)
        return min(samples)

    assert 4 < least_s(80_000_000) / least_s(10_000_000) < 16


def test_a_line_per_model_and_an_error_for_wrong_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3)).eval().requires_grad_(False)
    monkeypatch.setattr(models, "load", lambda name: (model, (torch.randn(1, 3, 32, 32),)))
    monkeypatch.setattr(fma_bound, "TURN_S", 1e-3)
    assert fma_bound.main(["net", "--rounds", "1"]) == 0
    assert "of the bound" in capsys.readouterr().out
    monkeypatch.setattr(fma_bound, "relative_error", lambda *_: 1.0)
    assert fma_bound.main(["net", "--rounds", "1"]) == 1
