"""Whole numbers: lanes cover channels exactly once, and division rounds up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sepc.ir.arithmetic import ceil_div, split_lanes


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.integers(0, 200), st.sampled_from([1, 4, 8, 16]))
def test_lanes_cover_the_channels_with_few_vectors(channels: int, lanes: int) -> None:
    widths = split_lanes(channels, lanes)
    assert sum(widths) == channels
    assert list(widths) == sorted(widths, reverse=True)
    assert all(width & (width - 1) == 0 and width <= lanes for width in widths)
    assert len(widths) == channels // lanes + (channels % lanes).bit_count()


def test_division_rounds_up() -> None:
    assert [ceil_div(value, 4) for value in (0, 1, 4, 5)] == [0, 1, 1, 2]
