"""The example of separation trains, separates, distils and draws, all in small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples import separate as example
from sepc.separation import latency, menus


def test_crops_for_training_and_for_tests_are_of_different_parts() -> None:
    picture = torch.arange(200.0).expand(60, 200)
    torch.manual_seed(0)
    columns = [example.crops([picture], 50, trained)[0] for trained in (True, False)]
    assert columns[0].max() < 200 * example.TRAINED_SHARE <= columns[1].min()
    assert columns[1].max() <= 199


def test_pictures_are_of_mean_zero_and_deviation_one() -> None:
    pictures = example.load_pictures()
    assert len(pictures) == len(example.PICTURES)
    assert all(abs(float(one.mean())) < 1e-3 and abs(float(one.std()) - 1) < 1e-3 for one in pictures)


@pytest.mark.slow
def test_it_prints_a_table_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "CALIBRATION", 64)
    monkeypatch.setattr(example, "TESTED", 64)
    monkeypatch.setattr(menus, "RANKS", 2)
    monkeypatch.setattr(menus, "MENU_STEPS", 1)
    monkeypatch.setattr(latency, "ENOUGH_S", 0.1)
    plot = tmp_path / "plot.svg"
    small = ["--train-steps", "2", "--distill-steps", "2", "--speedups", "1.05", "--output", str(plot)]
    assert example.main(small) == 0
    output = capsys.readouterr().out
    assert [label in output for label in ("dense", "fitted", "distilled for 2 steps")] == [True] * 3
    assert "Distilled in 2 steps" in output
    assert "<svg" in plot.read_text()
