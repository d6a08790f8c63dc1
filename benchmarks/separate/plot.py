"""The plot: top-1 against the measured speed-up, a panel per network and a curve per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.separate.results import DENSE, OURS, Row, mean, methods, networks
from sepc.report.plots import save
from sepc.report.tradeoff import Curve, draw_tradeoff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Points below the dense network's top-1 that are still shown.
DEPTH: Final = 6.0


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of `rows`, means over seeds, to `path`."""
    size_inches = (1 + 5.5 * len(networks(rows)), 4.8)
    save(lambda figure: _draw(figure, rows), path, size_inches)


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    names = networks(rows)
    for axes, network in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [row for row in rows if row.network == network]
        dense = mean([row.top1 for row in own if row.method == DENSE])
        curves = [
            Curve(f"sepc, {method}" if method in OURS else method, curve(own, method), is_quiet=method not in OURS)
            for method in methods(own)
        ]
        draw_tradeoff(axes, dense, curves, "top-1 on 10,000 test images, %, mean over seeds")
        axes.set_ylim(dense - DEPTH, dense + 0.5)
        axes.set_title(network)


def curve(rows: Sequence[Row], method: str) -> list[tuple[float, float]]:
    """Measured speed-ups and top-1 of a method, means over seeds, in order."""
    wishes = sorted({row.wanted for row in rows if row.method == method})
    groups = [[row for row in rows if row.method == method and row.wanted == wanted] for wanted in wishes]
    return sorted((mean([row.speedup for row in group]), mean([row.top1 for row in group])) for group in groups)
