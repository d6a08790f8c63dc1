"""What a terminal shows of anything that takes longer than two seconds; where there is no terminal, nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from tqdm import tqdm

DELAY_S: Final = 2.0
REFRESH_S: Final = 0.5
_Item = TypeVar("_Item")


def progress(items: Iterable[_Item], what: str, total: int | None = None) -> Iterator[_Item]:
    """The `items`, with a bar that counts them; `total` is how many there are, if they do not say so themselves."""
    yield from tqdm(items, desc=what, total=total, disable=None, delay=DELAY_S, leave=False)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """While the block runs, which does not say how far it is: the time that it has taken."""
    terminal = sys.stderr  # As it is now: in the block it may be redirected.
    if not terminal.isatty():
        yield
        return
    done = threading.Event()

    def show() -> None:
        if done.wait(DELAY_S):
            return
        with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False, file=terminal) as bar:
            while not done.wait(REFRESH_S):
                bar.refresh()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
