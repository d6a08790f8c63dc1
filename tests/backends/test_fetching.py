"""What blocks fetch: all that is to be fetched, and not much more; into the outer caches what is for later kernels."""

from __future__ import annotations

import pytest

from sepc.backends.stages import fetching
from sepc.backends.stages.fetching import AheadShare, Visit, WeightShare
from sepc.cost_model.tiling import Ahead

LINE = 16


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[bool, set[int]]:
    """The lines that are fetched, into the outer caches and into all."""
    found: dict[bool, set[int]] = {False: set(), True: set()}

    def prefetch(weight: object, index: int, *, outer: bool = False) -> None:
        found[outer].add(index // LINE)

    monkeypatch.setattr(fetching, "prefetch", prefetch)
    monkeypatch.setattr(fetching, "line_elements", lambda weight: LINE)
    monkeypatch.setattr(fetching, "element_bytes", lambda weight: 4)
    return found


@pytest.mark.parametrize("columns", [1, 7, 10])
@pytest.mark.parametrize("fetched_elements", [1000, 16 * 4321, 500_000])
def test_the_blocks_of_a_kernel_together_fetch_all_that_lies_ahead(
    lines: dict[bool, set[int]], fetched_elements: int, columns: int
) -> None:
    panels, pixels, steps, elements = 5, 49, 32, 5 * 32 * 16
    ahead = Ahead(4 * fetched_elements, skipped_bytes=4 * 160)
    for panel in range(panels):
        share = AheadShare(ahead, elements, panels * pixels, panel * pixels, columns, steps)
        for start in range(0, pixels, columns):
            for step in range(steps):
                share.prefetch(None, step, start)
    first = (elements + 160) // LINE
    wanted = set(range(first, first + fetched_elements // LINE))
    assert wanted <= lines[True]
    most = panels * pixels * steps  # Each step rounds up to an element, and the last block has columns to spare.
    assert max(lines[True]) <= max(wanted) + most // LINE + 1 + columns * fetched_elements // (panels * pixels * LINE)
    assert not lines[False]


def test_the_blocks_that_read_a_panel_together_fetch_the_next_one(lines: dict[bool, set[int]]) -> None:
    pixels, columns, steps, elements = 49, 7, 32, 32 * 48
    share = WeightShare(Visit(pixels, 0), columns, elements, steps, panel=elements)
    for start in range(0, pixels, columns):
        for step in range(steps):
            share.prefetch(None, step, start)
    assert set(range(2 * elements // LINE, 3 * elements // LINE)) <= lines[False]
    assert not lines[True]
