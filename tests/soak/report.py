"""What a soak test has found, as text and as docs/reliability.md."""

from __future__ import annotations

import platform
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sepc.cost_model.detect import host_cpu
from sepc.runtime.manifest import versions
from tests.soak.outcome import Outcome

LOST = "entries lost"
MILLISECONDS = "milliseconds that these took"
CALLS = "calls of one model from 8 threads"


@dataclass
class Soak:
    """The outcomes of all trials, and the processes that crashed.

    Attributes:
        minutes: how long it was to take. counts: what was tried, by name. wrong: what was wrong. crashes: who crashed.
    """

    minutes: float
    trials: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Add what a trial tells."""
        self.trials += 1
        self.counts.update(outcome.counts)
        self.wrong += outcome.wrong

    def crashed(self, what: str) -> None:
        """Note a process that ended by a signal, an exception, or not at all."""
        self.crashes.append(what)

    def ended(self) -> None:
        """Note how long it took."""
        self.seconds = time.monotonic() - self.began_s

    @property
    def failed(self) -> bool:
        """Whether anything was wrong."""
        return bool(self.wrong or self.crashes or self.counts[LOST])

    def line(self) -> str:
        """How it stands."""
        return f"{self.trials} trials, {len(self.wrong)} wrong, {len(self.crashes)} crashes"

    def rows(self) -> list[tuple[str, str]]:
        """What was tried, how often; then what went wrong."""
        shown = [(name, count) for name, count in self.counts.items() if name not in (LOST, MILLISECONDS)]
        rows = [(name, f"{count:,}") for name, count in sorted(shown)]
        if self.counts[MILLISECONDS]:
            rate = 1000 * self.counts[CALLS] / self.counts[MILLISECONDS]
            rows.append(("calls per second from 8 threads", f"{rate:,.0f}"))
        bad = (("wrong results", len(self.wrong)), ("crashes", len(self.crashes)), (LOST, self.counts[LOST]))
        return [*rows, *((f"**{name}**", f"**{count}**") for name, count in bad)]

    def text(self) -> str:
        """A line for each count, and for each thing that went wrong."""
        rows = [f"{name.strip('*'):48} {count.strip('*'):>10}" for name, count in self.rows()]
        return "\n".join(
            [f"{self.trials} trials in {self.seconds / 60:.1f} minutes", *rows, *self.wrong, *self.crashes]
        )


def write(path: Path, soak: Soak) -> None:
    """Replace the part of a page between its marks by what `soak` has found."""
    begin, end = "<!-- counts: written by tests.soak -->\n", "<!-- end of counts -->"
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    found = versions()
    made = (
        f"{soak.trials:,} trials in {soak.seconds / 60:.0f} minutes, {time.strftime('%Y-%m-%d')}, "
        f"{host_cpu().model_name}, Python {platform.python_version()}, "
        f"torch {found['torch']}, TVM {found['apache-tvm']}.\n"
    )
    table = ["| tried | count |", "|---|---:|", *(f"| {name} | {count} |" for name, count in soak.rows())]
    bad = [f"- {line}" for line in (*soak.wrong, *soak.crashes)]
    content = "\n".join([made, *table, *(["", "What went wrong:", "", *bad] if bad else []), "", end])
    path.write_text(f"{before}{begin}{content}{after}", encoding="utf-8")
