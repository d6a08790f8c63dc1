"""How long the stages of a compilation take."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """Splits elapsed time into named laps, in seconds."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a lap; laps of one name add up."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def add(self, laps: Mapping[str, float]) -> None:
        """Take over `laps`, which somebody else has timed until now."""
        self.laps.update(laps)
        self._last = time.perf_counter()
