"""The benchmark of compile times: what becomes of the figures of its processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compile_time


def processes(monkeypatch: pytest.MonkeyPatch, **changes: dict[str, Any]) -> None:
    """Processes that do nothing, and answer with these figures."""
    answers: dict[str, dict[str, Any]] = {
        "cold": {"time_s": 8.0, "stages_s": {"capture": 2.0, "kernels": 5.0}, "error": 1e-6},
        "export": {"time_s": 0.9},
        "warm": {"time_s": 1.1, "error": 2e-6, "imported_tvm": False},
        "load": {"time_s": 0.1, "first_run_s": 0.05, "error": 0.0, "imported_tvm": False},
    }
    for way, change in changes.items():
        answers[way] |= change
    monkeypatch.setattr(compile_time, "_run", lambda way, *_: answers[way])


def test_goals_that_are_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes(monkeypatch)
    assert compile_time.main(["mobilenetv2_100", "--json", str(tmp_path / "figures.json")]) == 0
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert figures["warm_extra_s"] == pytest.approx(0.2)
    assert figures["error"] == 2e-6
    assert "adds 0.20" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"cold": {"time_s": 10.5}},
        {"warm": {"time_s": 1.5}},
        {"warm": {"imported_tvm": True}},
        {"load": {"imported_tvm": True}},
        {"load": {"error": 1e-3}},
    ],
)
def test_a_goal_that_is_missed_is_an_error(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    processes(monkeypatch, **changes)
    assert compile_time.main(["mobilenetv2_100"]) == 1
