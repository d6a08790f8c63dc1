"""Accuracy against latency, of what `sepc.separate` gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from torch import nn

import sepc
from sepc.report import tradeoff
from sepc.report.tradeoff import Curve, draw_tradeoff
from sepc.separable.plan import Plan
from sepc.separable.result import Separation


def separation(before_us: float, after_us: float, measured: bool = True) -> Separation:
    times = (before_us, after_us)
    predicted = (1.0, 1.0) if measured else times
    return Separation(nn.Identity(), Plan(), [], {}, "some", math.nan, predicted, times if measured else None)


def test_curves_start_at_the_original_in_the_order_of_speed() -> None:
    axes = Figure().subplots()
    draw_tradeoff(axes, 0.9, [Curve("ours", [(3.0, 0.8), (2.0, 0.85)]), Curve("theirs", [(2.0, 0.5)], True)], "top-1")
    assert list(axes.lines[0].get_xdata()) == [1.0, 2.0, 3.0]
    assert list(axes.lines[0].get_ydata()) == [0.9, 0.85, 0.8]
    assert [one.get_linestyle() for one in axes.lines[:2]] == ["-", "--"]
    legend = axes.get_legend()
    assert legend is not None
    assert [one.get_text() for one in legend.get_texts()] == ["ours", "theirs"]
    assert axes.get_ylabel() == "top-1"


@pytest.mark.parametrize("measured", [True, False])
def test_separations_are_drawn_by_the_times_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    seen: list[Curve] = []
    draw = tradeoff.draw_tradeoff
    monkeypatch.setattr(tradeoff, "draw_tradeoff", lambda axes, *rest: (seen.extend(rest[1]), draw(axes, *rest)))
    groups = {"calibrated": [separation(100.0, 50.0, measured), separation(120.0, 30.0, measured)]}
    original = nn.ReLU()
    written = sepc.plot_separations(
        groups, tmp_path / "accuracy.svg", original=original, accuracy=lambda model: 0.9 if model is original else 0.8
    )
    assert seen == [Curve("calibrated", [(2.0, 0.8), (4.0, 0.8)])]
    text = written.read_text()
    assert (">ms, predicted<" in text) != measured
    assert ">accuracy<" in text


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(sepc.InputError, match="no separations to draw"):
        sepc.plot_separations({"calibrated": []}, tmp_path / "a.svg", original=nn.ReLU(), accuracy=lambda model: 1.0)
