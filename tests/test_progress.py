"""What takes long is shown at a terminal, after a while, and nowhere else."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr

import pytest

from sepc import progress as module
from sepc.progress import progress, waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of standard error; not as a fixture, as pytest sets its own between set-up and call."""
    made = Terminal()
    monkeypatch.setattr("sys.stderr", made)
    return made


def test_what_is_done_at_once_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    assert list(progress([1, 2, 3], "counting")) == [1, 2, 3]
    with waiting("nothing"):
        pass
    assert not terminal.getvalue()


def test_what_takes_longer_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(module, "DELAY_S", 0.01)
    for _ in progress(iter("abcd"), "counting", total=4):
        time.sleep(0.15)
    assert "counting: " in terminal.getvalue()
    assert "/4 [" in terminal.getvalue()


def test_what_does_not_say_how_far_it_is_shows_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(module, "DELAY_S", 0.01)
    with waiting("tracing"), redirect_stderr(io.StringIO()) as other:
        time.sleep(0.1)
    assert not other.getvalue()
    assert "tracing: 00:00" in terminal.getvalue()


def test_without_a_terminal_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "DELAY_S", 0.0)
    with waiting("tracing"):
        assert list(progress(range(3), "counting")) == [0, 1, 2]
        time.sleep(0.05)
    assert capfd.readouterr() == ("", "")


def test_an_error_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_of(monkeypatch)
    with pytest.raises(ZeroDivisionError), waiting("dividing"):
        raise ZeroDivisionError
