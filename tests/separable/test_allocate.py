"""The frontier holds the best allocation for every time, as trying all of them shows."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from sepc.separable.allocate import Allocation, Candidate, frontier


def random_menus(seed: int) -> dict[str, list[Candidate[int]]]:
    source = random.Random(seed)
    return {
        name: [Candidate(0, 100, 0.0)]
        + [Candidate(index, source.randint(1, 90), source.random()) for index in range(1, 5)]
        for name in "abcd"
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_that_of_all_combinations(seed: int) -> None:
    menus = random_menus(seed)
    found = frontier(menus, 400)
    every = [Allocation(dict(zip(menus, one, strict=True))) for one in itertools.product(*menus.values())]
    for limit in range(10, 401, 10):  # Multiples of the rounding, 400 / 2000.
        best = min((one.error for one in every if one.time_us <= limit), default=math.inf)
        got = min((one.error for one in found if one.time_us <= limit), default=math.inf)
        assert got == pytest.approx(best)


def test_it_goes_from_no_change_to_the_quickest() -> None:
    menus = random_menus(7)
    found = frontier(menus, 400)
    assert found[0].error == 0
    assert {path: one.item for path, one in found[0].chosen.items()} == dict.fromkeys("abcd", 0)
    times, errors = [one.time_us for one in found], [one.error for one in found]
    assert times == sorted(times, reverse=True)
    assert errors == sorted(errors)
    assert times[-1] == sum(min(one.time_us for one in menu) for menu in menus.values())


def test_no_change_is_among_them_whatever_the_rounding() -> None:
    menus = {name: [Candidate(0, 100 / 3, 0.0), Candidate(1, 1.0, 0.5)] for name in "abcdefg"}
    assert frontier(menus, 700 / 3)[0].error == 0


def test_nothing_to_choose_from_is_no_change() -> None:
    (only,) = frontier({}, 0.0)
    assert (only.chosen, only.time_us, only.error) == ({}, 0, 0)
