"""Fixtures shared by all tests: a fixed seed, two threads, no calibration, no cache, and golden files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing with them"
    )


def pytest_configure() -> None:
    # Tests of the compiler compile. Here, since fixtures of a whole module come before those of a test.
    os.environ["SEPC_CACHE"] = "0"


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    # What this user once measured is not to decide what the tests compile.
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Turns the cache of compiled models on, in a place of this test's own; entries are in this directory."""
    from sepc.cache_key import SOURCES_DIGEST

    monkeypatch.setenv("SEPC_CACHE", "1")
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path))
    # Others may edit sepc while its tests run.
    monkeypatch.setattr("sepc.cache.read_sources_digest", lambda: SOURCES_DIGEST)
    return tmp_path / "models"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with tests/golden/<name>.txt, or writes that file with --update-golden."""

    def check(name: str, text: str) -> None:
        path = _GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing; write it with --update-golden"
        assert text == path.read_text(), f"{path} differs; if the change is meant, use --update-golden"

    return check
