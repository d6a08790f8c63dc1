"""The choice of one option for every layer: an exact knapsack over predicted times and errors.

Layers ℓ have options with times t and errors e, of which one is taken for each. Squares of errors are taken to add up,
as those of different layers are hardly correlated. The frontier is

    min Σ e²  subject to  Σ t ≤ T            for every T

Times are rounded up to a `STEPS`-th of the time of all layers as they are, so that the minimum over the sums of the
first ℓ layers, for each of the `STEPS` limits, follows from that of the first ℓ − 1. For these times it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

STEPS: Final = 2000
Key = TypeVar("Key")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Candidate(Generic[Item]):
    """An option of a layer: what it takes, and the relative error that comes with it."""

    item: Item
    time_us: float
    error: float


@dataclass(frozen=True)
class Allocation(Generic[Key, Item]):
    """One candidate for every layer."""

    chosen: Mapping[Key, Candidate[Item]]

    @property
    def time_us(self) -> float:
        """Of all layers."""
        return sum(one.time_us for one in self.chosen.values())

    @property
    def error(self) -> float:
        """The root of the sum of squares."""
        return math.sqrt(sum(one.error**2 for one in self.chosen.values()))


def frontier(menus: Mapping[Key, Sequence[Candidate[Item]]], time_us: float) -> list[Allocation[Key, Item]]:
    """The allocations with the least error for their time, from the slowest to the quickest.

    Args:
        menus: the candidates of every layer.
        time_us: of all layers as they are, the largest time of interest.
    """
    if not menus:
        return [Allocation({})]
    unit = max(time_us, 1e-9) / STEPS
    largest = STEPS + len(menus)  # As each is rounded up.
    best = [0.0] * (largest + 1)
    choices: list[list[int]] = []
    for candidates in menus.values():
        costs = [math.ceil(one.time_us / unit - 1e-9) for one in candidates]
        following, chosen = [math.inf] * (largest + 1), [-1] * (largest + 1)
        for limit in range(largest + 1):
            for index, (one, cost) in enumerate(zip(candidates, costs, strict=True)):
                if cost <= limit and best[limit - cost] + one.error**2 < following[limit]:
                    following[limit], chosen[limit] = best[limit - cost] + one.error**2, index
        best = following
        choices.append(chosen)
    limits = [limit for limit in range(largest, -1, -1) if best[limit] < math.inf]
    steps = [limit for limit in limits if limit == 0 or best[limit - 1] > best[limit]]
    return [_trace(menus, choices, unit, limit) for limit in steps]


def _trace(
    menus: Mapping[Key, Sequence[Candidate[Item]]], choices: Sequence[Sequence[int]], unit: float, limit: int
) -> Allocation[Key, Item]:
    chosen: dict[Key, Candidate[Item]] = {}
    for key, row in zip(reversed(list(menus)), reversed(choices), strict=True):
        chosen[key] = menus[key][row[limit]]
        limit -= math.ceil(chosen[key].time_us / unit - 1e-9)
    return Allocation({key: chosen[key] for key in menus})
