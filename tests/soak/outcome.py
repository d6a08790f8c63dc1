"""What a trial of the soak test tells: counts of what was tried, and what went wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# A trial draws what it tries from a seed, and may use a directory of its own, which is empty at first.
Trial = Callable[[int, Path], "Outcome"]


@dataclass
class Outcome:
    """Counts of what was tried, by name, and a line for each thing that went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, right: bool, what: str) -> None:
        """Note `what` as wrong unless it is `right`."""
        if not right:
            self.wrong.append(what)

    def add(self, other: Outcome) -> None:
        """Add what another trial tells."""
        self.counts.update(other.counts)
        self.wrong += other.wrong

    def to_json(self) -> str:
        """One line of text."""
        return json.dumps({"counts": self.counts, "wrong": self.wrong})

    @staticmethod
    def of_json(text: str) -> Outcome:
        """What `to_json` wrote."""
        content = json.loads(text)
        return Outcome(Counter(content["counts"]), content["wrong"])
