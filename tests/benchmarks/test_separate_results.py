"""Tables, comparisons and the plot of what was measured for separated networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.separate.plot import curve
from benchmarks.separate.results import CALIBRATED, DENSE, Row, comparisons, margin, merged, read, table, text, write


def row(method: str, wanted: float, speedup: float, top1: float, seed: int = 0) -> Row:
    return Row("vgg", seed, 1, method, wanted, speedup, 400.0, 400.0 / speedup, top1, wanted, 1.0, "")


ROWS = [
    row(DENSE, 1, 1, 93),
    row(CALIBRATED, 2, 2.0, 92.5),
    row(CALIBRATED, 4, 4.0, 91.5),
    row("decoupling", 2, 1.5, 92),
    row("decoupling", 4, 3.0, 92.25),
    row("decoupling", 6, 6.0, 50),
]


def test_margins_are_to_the_curve_at_the_same_measured_speedup() -> None:
    assert margin(ROWS, ROWS[3]) == pytest.approx(92.75 - 92)
    assert margin(ROWS, ROWS[4]) == pytest.approx(92.0 - 92.25), "negative where the other one is above"
    assert margin(ROWS, ROWS[5]) is None, "the curve has ended before"


def test_comparisons_tell_where_sepc_is_not_above() -> None:
    (told,) = comparisons(ROWS)
    assert "above decoupling at 1 of 2 speed-ups, by -0.25 points at the least (at 3.00×)" in told


def test_tables_have_means_over_seeds_and_say_what_is_missing() -> None:
    more = [*ROWS, row(DENSE, 1, 1, 92, seed=1), row(CALIBRATED, 2, 2.2, 91, seed=1)]
    lines = table(more, "vgg").splitlines()
    assert "93.00 (seed 0), 92.00 (seed 1)" in lines[0]
    calibrated = next(one for one in lines if one.startswith(CALIBRATED))
    assert "0.75 at 2.10× " in calibrated
    assert "1.50 at 4.00×*" in calibrated, "of one seed only"
    assert calibrated.endswith("none"), "at 6×"


def test_rows_are_kept_and_replaced_by_new_ones_of_the_same(tmp_path: Path) -> None:
    write(ROWS, tmp_path)
    old = read(tmp_path / "separate.json")
    assert old == ROWS
    new = row(CALIBRATED, 2, 2.1, 92.6)
    both = merged(old, [new])
    assert len(both) == len(ROWS)
    assert both[1] == new
    assert (tmp_path / "separate.txt").read_text() == text(ROWS)
    assert (tmp_path / "separate.svg").read_text().startswith("<?xml")
    assert read(tmp_path / "nothing.json") == []


def test_curves_are_means_over_seeds_in_order_of_speed() -> None:
    more = [row(CALIBRATED, 4, 4.2, 91.0, seed=1), *ROWS]
    assert curve(more, CALIBRATED) == [(2.0, 92.5), (4.1, 91.25)]
