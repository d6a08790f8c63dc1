"""How many times as fast a network is as another, both compiled by sepc, timed in turn.

These networks take some hundred microseconds, and machines are shared. So turns are short, a few calls, for both
networks to meet the same neighbours; and there are many, of whose ratios the median is taken. What counts of a turn is
its quickest call: a longer one is interrupted more often, so that medians would be in favour of the quicker network.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

import sepc
from sepc.bench.measure import TOLERANCE, relative_error

CALLS: Final = 8
WARM_UP: Final = 2  # Each finds caches as the other one left them.

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Timing:
    """How many times as fast a network is as the dense one, and the median times of both in microseconds."""

    speedup: float
    dense_us: float
    reduced_us: float


def compiled(model: nn.Module, x: torch.Tensor, threads: int) -> Compiled:
    """`model` compiled by sepc for inputs like `x`; raises if it is wrong."""
    found = sepc.compile(model, target="native", example_inputs=(x,), num_threads=threads)
    with torch.inference_mode():
        error = relative_error([found(x)], [model(x)])
    if not error <= TOLERANCE:
        raise RuntimeError(f"a compiled network is off by {error:.1e}")
    return found


def timing(dense: Compiled, reduced: Compiled, x: torch.Tensor, rounds: int) -> Timing:
    """Both in turn, so many times: the median of the rounds' ratios."""
    with torch.inference_mode():
        turns = [(_turn_us(dense, x), _turn_us(reduced, x)) for _ in range(rounds)]
    before, after = (statistics.median(times) for times in zip(*turns, strict=True))
    return Timing(statistics.median(a / b for a, b in turns), before, after)


def _turn_us(function: Compiled, x: torch.Tensor) -> float:
    samples: list[float] = []
    for _ in range(WARM_UP + CALLS):
        begin_ns = time.perf_counter_ns()
        function(x)
        samples.append((time.perf_counter_ns() - begin_ns) / 1e3)
    return min(samples[WARM_UP:])
