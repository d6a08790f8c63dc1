"""How strong a method has to be for a wanted speed-up, as measured: found by bisection."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

logger = logging.getLogger(__name__)

STEPS: Final = 8
# Near enough, as a ratio; measurements are hardly more exact.
NEAR: Final = 1.02


@dataclass(frozen=True)
class Trial:
    """A strength, and the speed-up that it was measured to give."""

    strength: float
    speedup: float


def find(wanted: float, measure: Callable[[float], float], trials: list[Trial]) -> Trial | None:
    """The trial with the speed-up nearest to `wanted`; None if the greatest strength, 1, does not reach it.

    Args:
        wanted: a speed-up.
        measure: the speed-up for a strength between 0 and 1; with 0 it is 1.
        trials: all that was measured before; new ones are added.
    """
    for _ in range(STEPS):
        low, high = bracket(wanted, trials)
        if high is None:
            if any(one.strength == 1 for one in trials):
                return None
            strength = 1.0
        elif _distance(_nearest(wanted, trials), wanted) <= math.log(NEAR):
            break
        else:
            strength = (low + high) / 2
        trials.append(Trial(strength, measure(strength)))
        logger.info("strength %.4f: %.2f times as fast", strength, trials[-1].speedup)
    return _nearest(wanted, trials)


def bracket(wanted: float, trials: Sequence[Trial]) -> tuple[float, float | None]:
    """Strengths below and above: noise may have them overlap, so the lowest that suffices bounds those that do not."""
    high = min((one.strength for one in trials if one.speedup >= wanted), default=None)
    below = [one.strength for one in trials if one.speedup < wanted and (high is None or one.strength < high)]
    return max(below, default=0.0), high


def _nearest(wanted: float, trials: Sequence[Trial]) -> Trial:
    """The trial with the speed-up nearest to `wanted`; of several the one with the least strength."""
    return min(trials, key=lambda one: (_distance(one, wanted), one.strength))


def _distance(one: Trial, wanted: float) -> float:
    return abs(math.log(one.speedup / wanted))
