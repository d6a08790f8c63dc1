"""Guard pages: they catch who touches them, and no kernel of the models does."""

from __future__ import annotations

import ctypes
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import TESTED
from tests.soak import compute, forked, guards


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("size", [1, 100, 4096, 5000])
def test_memory_ends_where_its_guard_page_begins(side: guards.Side, size: int) -> None:
    def touch(offset: int) -> int:
        with guards.guarded(size, side) as address:
            ctypes.memset(address, 1, size)
            ctypes.memset(address + offset, 1, 1)
        return forked.RIGHT

    assert forked.run(lambda: touch(size - 1)) == forked.RIGHT
    assert forked.run(lambda: touch(size if side == "end" else -1)) == -signal.SIGSEGV


def test_a_kernel_that_declares_too_little_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = guards.declared_bytes

    def too_little(function: Any) -> list[int]:
        return [size - 4 for size in declared(function)]

    model, inputs = compute.random_model(1)

    def run() -> int:
        compiled = compute.sepc.compile(model, num_threads=1, example_inputs=(inputs,))
        sides, kernels = guards.differing_sides(compiled, inputs)
        assert not sides
        assert kernels > 2
        monkeypatch.setattr(guards, "declared_bytes", too_little)
        guards.differing_sides(compiled, inputs)
        return forked.RIGHT

    assert forked.run(run) == -signal.SIGSEGV


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTED)
def test_no_kernel_of_a_model_touches_what_is_not_its_own(name: str, tmp_path: Path) -> None:
    outcome = compute.whole_models(TESTED.index(name), tmp_path)
    assert not outcome.wrong
    assert outcome.counts["runs of kernels between guard pages"] > 10
