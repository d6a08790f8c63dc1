"""How many times as fast a compiled model is as another, timed in turn.

Models that are worth separating may take some hundred microseconds, and machines are shared. So turns are short, a few
calls, for both models to meet the same neighbours; and there are many, of whose ratios the median is taken. What counts
of a turn is its quickest call: a longer one is interrupted more often, so that medians would favour the quicker model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

CALLS: Final = 8
WARM_UP: Final = 2  # Each finds caches as the other one left them.
ROUNDS: Final = 200
LEAST_ROUNDS: Final = 20
ENOUGH_S: Final = 10.0
"""After which there are no more rounds than the least."""

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Timing:
    """How many times as fast a model is as the dense one, and the median times of both in microseconds."""

    speedup: float
    dense_us: float
    reduced_us: float


def timing(dense: Compiled, reduced: Compiled, inputs: Sequence[torch.Tensor], rounds: int = ROUNDS) -> Timing:
    """Both in turn, so many times, or fewer where that takes long: the median of the rounds' ratios."""
    turns: list[tuple[float, float]] = []
    end_s = time.perf_counter() + ENOUGH_S
    with torch.inference_mode():
        while len(turns) < rounds and (len(turns) < LEAST_ROUNDS or time.perf_counter() < end_s):
            turns.append((_turn_us(dense, inputs), _turn_us(reduced, inputs)))
    before, after = (statistics.median(times) for times in zip(*turns, strict=True))
    return Timing(statistics.median(a / b for a, b in turns), before, after)


def _turn_us(function: Compiled, inputs: Sequence[torch.Tensor]) -> float:
    samples: list[float] = []
    for _ in range(WARM_UP + CALLS):
        begin_ns = time.perf_counter_ns()
        function(*inputs)
        samples.append((time.perf_counter_ns() - begin_ns) / 1e3)
    return min(samples[WARM_UP:])
