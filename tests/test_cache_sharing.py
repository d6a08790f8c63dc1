"""The cache of compiled models among many processes and threads, some of which are killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import pytest

import sepc
from sepc.cache import Cache
from tests.test_cache import ROOT, X, came_from_cache, model


@pytest.fixture
def directory(own_cache: Path) -> Path:
    """A cache of this test's own; entries are in this directory."""
    return own_cache


MANY = """
import os, sys, torch, sepc
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
x = torch.randn(2, 3, 8, 8)
expected = model(x).detach()
import sepc._compile, sepc.cache_key
sepc.cache.read_sources_digest = lambda: sepc.cache_key.SOURCES_DIGEST  # others may edit sepc while its tests run
start, go = os.pipe()
children = []
for _ in range(16):
    if not (child := os.fork()):
        os.read(start, 1)
        fast = sepc.compile(model, num_threads=1)
        right = torch.allclose(fast(x), expected, atol=1e-5)
        os._exit((not right) * 2 + (list(fast.compile_times) == ["capture", "cache"]))
    children.append(child)
os.write(go, bytes(16))
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.slow
def test_of_sixteen_processes_one_compiles_and_the_others_take_that(directory: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MANY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([0] + [1] * 15)
    (path,) = directory.iterdir()
    Cache(directory).verify(Cache(directory).entries()[0])
    assert path.suffix == ".sepc"


def test_of_threads_that_compile_the_same_one_does(directory: Path) -> None:
    models = [model() for _ in range(4)]  # Here, as threads share the generator of random numbers.
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: sepc.compile(one, num_threads=1, example_inputs=(X,)), models))
    assert sorted(map(came_from_cache, found)) == [False, True, True, True]


@pytest.mark.parametrize("moment", ["sepc._compile._compile", "sepc.runtime.artifact._write"])
def test_after_a_process_was_killed_the_next_one_works_and_tidies_up(directory: Path, moment: str) -> None:
    code = f"""
import os, signal, torch, sepc, sepc.runtime.artifact, sepc._compile, sepc.cache_key
from torch import nn
from unittest import mock
sepc.cache.read_sources_digest = lambda: sepc.cache_key.SOURCES_DIGEST
from tests.test_cache import X, model
torch.set_num_threads(2)
with mock.patch("{moment}", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
    sepc.compile(model(), example_inputs=(X,))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(path.suffix for path in directory.iterdir())
    assert left == ([".lock", ".tmp"] if "artifact" in moment else [".lock"])
    assert not came_from_cache(sepc.compile(model(), example_inputs=(X,)))
    assert [path.suffix for path in directory.iterdir()] == [".sepc"]
    assert came_from_cache(sepc.compile(model(), example_inputs=(X,)))


def test_who_waits_too_long_compiles(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sepc.compile(model(), example_inputs=(X,))
    (path,) = directory.iterdir()
    path.unlink()
    monkeypatch.setattr("sepc.cache.LONGEST_WAIT_S", 0.2)
    with filelock.FileLock(path.with_suffix(".lock")):
        assert not came_from_cache(sepc.compile(model(), example_inputs=(X,)))
    assert "takes more than" in caplog.text


def test_without_locks_models_are_compiled_and_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert [came_from_cache(sepc.compile(model(), example_inputs=(X,))) for _ in range(2)] == [False, True]


def test_a_compilation_that_fails_gives_the_lock_back(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CC", raising=False)
        with pytest.raises(sepc.BuildError, match="no C compiler"):
            sepc.compile(model(), example_inputs=(X,))
    assert not list(directory.iterdir())
    assert not came_from_cache(sepc.compile(model(), example_inputs=(X,)))
