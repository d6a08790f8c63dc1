"""The soak test's shorter form, and that it tells what goes wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.soak import __main__ as soak
from tests.soak.outcome import Outcome
from tests.soak.report import Soak, write

PAGE = "# Reliability\n\n<!-- counts: written by tests.soak -->\nold\n<!-- end of counts -->\n\nMore.\n"


@pytest.mark.slow
def test_everything_once(capsys: pytest.CaptureFixture[str]) -> None:
    status = soak.main(["--minutes", "0.5"])
    out = capsys.readouterr().out
    assert status == 0, out
    for name in ("random models", "random tilings", "malformed files", "faults injected", "forked processes that call"):
        assert name in out


def test_a_crash_is_told_with_the_last_words_and_the_next_seed_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, signal; print('kernel a', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    popen = soak.subprocess.Popen
    monkeypatch.setattr(
        soak.subprocess, "Popen", lambda command, **options: popen([command[0], "-c", script], **options)
    )
    found = Soak(1.0)
    assert soak._one_turn(found, "threads", 5, 1.0) == 6
    assert found.failed
    assert found.crashes == [f"threads with seed 5: -{int(signal.SIGKILL)}, after 'kernel a': "]


def test_what_is_wrong_is_counted_and_written(tmp_path: Path) -> None:
    found, outcome = Soak(1.0), Outcome()
    outcome.counts.update({"random models": 3, "entries lost": 0})
    outcome.check(True, "right")
    found.add(Outcome.of_json(outcome.to_json()))
    assert not found.failed
    outcome.check(False, "off by 1")
    found.add(outcome)
    assert found.failed
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    write(path, found)
    write(path, found)
    text = path.read_text()
    assert "| random models | 6 |" in text
    assert "| **wrong results** | **1** |" in text
    assert "- off by 1" in text
    assert text.count("<!-- end of counts -->\n\nMore.") == 1
    assert "old" not in text


def test_every_kind_is_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SEPC_CACHE", "0")
    assert all(callable(soak._trial(name)) for names in soak.KINDS.values() for name in names)
