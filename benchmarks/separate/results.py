"""Rows of the results: what was measured for one network by one method; kept in a file, and shown as tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

DENSE: Final = "dense"
CALIBRATED: Final = "calibrated"
DISTILLED: Final = "distilled"
WEIGHTS_ONLY: Final = "weights only"
WITH_MEANS: Final = "weights only, means re-estimated"
OURS: Final = (WEIGHTS_ONLY, WITH_MEANS, CALIBRATED, DISTILLED)
"""What sepc does, with more and more of the data, all in the same forms and ranks."""


@dataclass(frozen=True)
class Row:
    """One network, of one method, at one speed-up.

    Attributes:
        network, seed, threads: which, and how it ran.
        method: dense; one of `OURS`; or one of the literature.
        wanted: the speed-up that was asked for; 1 for dense.
        speedup: as measured, against the dense network compiled by sepc as well.
        dense_us, reduced_us: the medians that it is the ratio of.
        top1: in percent, on all test images.
        multiply_adds: of the dense network over those of this one.
        seconds: that it took to make it, beside what all speed-ups of a network share.
        details: what the layers became.
    """

    network: str
    seed: int
    threads: int
    method: str
    wanted: float
    speedup: float
    dense_us: float
    reduced_us: float
    top1: float
    multiply_adds: float
    seconds: float
    details: str

    @property
    def key(self) -> tuple[str, int, int, str, float]:
        """What it is a measurement of; there is one row of each."""
        return self.network, self.seed, self.threads, self.method, self.wanted


def line(row: Row) -> str:
    """A row as text."""
    head = f"{row.network:7} seed {row.seed}  {row.method:32}"
    if row.method == DENSE:
        return f"{head}  top-1 {row.top1:.2f}"
    return (
        f"{head}  {row.wanted:g}×: measured {row.speedup:.2f}× ({row.dense_us:.0f} → {row.reduced_us:.0f} µs)  "
        f"top-1 {row.top1:.2f}  {row.multiply_adds:.1f}× fewer multiply-adds  {row.seconds:.0f} s  {row.details}"
    ).rstrip()


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return [Row(**fields) for fields in json.loads(path.read_text())] if path.exists() else []


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, the new ones in the place of old ones of the same measurement."""
    return list({row.key: row for row in (*old, *new)}.values())


def write(rows: Sequence[Row], folder: Path) -> None:
    """All rows as JSON, as tables and as a plot."""
    from benchmarks.separate.plot import plot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "separate.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (folder / "separate.txt").write_text(text(rows))
    plot(rows, folder / "separate.svg")


def text(rows: Sequence[Row]) -> str:
    """The tables: of each network its methods with what each loses, then where sepc is above others, then all rows."""
    parts = [table(rows, network) for network in networks(rows)]
    parts.append("\n".join(comparisons(rows)) or "Nothing of the literature was run.")
    parts.append("\n".join(map(line, rows)))
    return "\n\n".join(parts) + "\n"


def networks(rows: Sequence[Row]) -> list[str]:
    """The names, each once."""
    return list(dict.fromkeys(row.network for row in rows))


def methods(rows: Sequence[Row]) -> list[str]:
    """The names, each once: sepc's first."""
    found = dict.fromkeys(row.method for row in rows if row.method != DENSE)
    return [name for name in OURS if name in found] + [name for name in found if name not in OURS]


def table(rows: Sequence[Row], network: str) -> str:
    """Points of top-1 lost at the measured speed-up, means over seeds: a row per method, a column per wish.

    There is none where a method cannot be so fast, or was not run.
    """
    own = [row for row in rows if row.network == network]
    dense = {row.seed: row.top1 for row in own if row.method == DENSE}
    wishes = sorted({row.wanted for row in own if row.method != DENSE})
    names = ", ".join(f"{top1:.2f} (seed {seed})" for seed, top1 in sorted(dense.items()))
    lines = [
        f"{network}: top-1 {names}; points lost at the measured speed-up, means over seeds (* not all of them)",
        f"{'asked for':34}" + "".join(f"{f'{wanted:g}×':>16}" for wanted in wishes),
    ]
    for method in methods(own):
        cells: list[str] = []
        for wanted in wishes:
            found = [row for row in own if row.method == method and row.wanted == wanted]
            lost = [dense[row.seed] - row.top1 for row in found]
            cell = f"{mean(lost):.2f} at {mean([row.speedup for row in found]):.2f}×" if found else "none"
            cells.append(f"{cell + '*' * (0 < len(found) < len(dense)):>16}")
        lines.append(f"{method:34}" + "".join(cells))
    return "\n".join(lines)


def mean(values: Sequence[float]) -> float:
    """Of some values."""
    return statistics.fmean(values)


def comparisons(rows: Sequence[Row]) -> list[str]:
    """For each method of the literature by how much sepc's curve is above it, at the least, and where."""
    lines: list[str] = []
    for network in networks(rows):
        for seed in sorted({row.seed for row in rows if row.network == network}):
            own = [row for row in rows if (row.network, row.seed) == (network, seed)]
            for method in (name for name in methods(own) if name not in OURS):
                margins = [
                    (above, row.speedup)
                    for row in own
                    if row.method == method and (above := margin(own, row)) is not None
                ]
                if margins:
                    least, speedup = min(margins)
                    where = f"{len([one for one, _ in margins if one > 0])} of {len(margins)} speed-ups"
                    lines.append(
                        f"{network}, seed {seed}: sepc, calibrated, is above {method} at {where}, by {least:+.2f} "
                        f"points at the least (at {speedup:.2f}×)"
                    )
    return lines


def margin(rows: Sequence[Row], other: Row) -> float | None:
    """How many points sepc's calibrated curve, straight between its points, is above `other`; None where it ends."""
    points = sorted((row.speedup, row.top1) for row in rows if row.method in (DENSE, CALIBRATED))
    for (left, high), (right, low) in pairwise(points):
        if left <= other.speedup <= right:
            return high + (low - high) * (other.speedup - left) / (right - left) - other.top1
    return None
