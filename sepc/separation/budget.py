"""What separating a model may cost, or has to gain: one of three kinds of budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sepc.errors import InputError


@dataclass(frozen=True)
class Budget:
    """What was asked for: one of the three."""

    max_error: float | None
    speedup: float | None
    evaluate: Callable[[nn.Module], float] | None
    max_drop: float

    @staticmethod
    def of(
        max_error: float | None,
        speedup: float | None,
        evaluate: Callable[[nn.Module], float] | None,
        max_drop: float | None,
    ) -> Budget:
        given = [one for one in (max_error, speedup, evaluate) if one is not None]
        if len(given) != 1 or (max_drop is None) != (evaluate is None):
            raise InputError(
                "There is no budget" if not given else "There is more than one budget, or half of one",
                fix="give exactly one of max_error=, speedup=, or evaluate= with max_drop=",
            )
        if max_error is not None and not max_error > 0:
            raise InputError(f"max_error is {max_error}", fix="give a positive number")
        if speedup is not None and not 1 < speedup < math.inf:
            raise InputError(f"speedup is {speedup}", fix="give a number above 1")
        return Budget(max_error, speedup, evaluate, max_drop or 0.0)

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"a speed-up of {self.speedup:g}"
        if self.max_error is not None:
            return f"a relative error of {self.max_error:g} at most"
        return f"a drop of {self.max_drop:g} at most in the evaluation"
