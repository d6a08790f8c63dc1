"""How many times as fast a model is as another: by turns."""

from __future__ import annotations

import pytest
import torch

from sepc.separation import latency
from sepc.separation.latency import LEAST_ROUNDS, timing


class Clock:
    """A clock that moves by what functions take, as told."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9

    def taking(self, *times_us: float) -> latency.Compiled:
        """A function that takes each of `times_us`, one per call, over and over."""
        calls = 0

        def call(*_: torch.Tensor) -> None:
            nonlocal calls
            self.now_ns += int(times_us[calls % len(times_us)] * 1000)
            calls += 1

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(latency, "time", result)
    return result


def test_the_quickest_call_of_a_turn_counts_as_others_are_interrupted(clock: Clock) -> None:
    found = timing(clock.taking(100.0, 900.0), clock.taking(50.0, 51.0, 400.0), (), rounds=5)
    assert (found.speedup, found.dense_us, found.reduced_us) == (2.0, 100.0, 50.0)


def test_there_are_so_many_rounds_and_fewer_of_what_takes_long(clock: Clock) -> None:
    timing(clock.taking(1.0), clock.taking(1.0), (), rounds=30)
    assert clock.now_ns == 30 * 2 * 10 * 1000
    clock.now_ns = 0
    timing(clock.taking(1e6), clock.taking(1e6), (), rounds=30)
    assert clock.now_ns == LEAST_ROUNDS * 2 * 10 * 10**9
