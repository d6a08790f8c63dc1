"""The plot: top-1 against the measured speed-up, a panel per network and a curve per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.separate.results import DENSE, OURS, Row, mean, methods, networks

# Points below the dense network's top-1 that are still shown.
DEPTH: Final = 6.0


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of `rows`, means over seeds, to `path`."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    names = networks(rows)
    figure, panels = plt.subplots(1, len(names), figsize=(1 + 5.5 * len(names), 4.8), squeeze=False)
    for axes, network in zip(panels[0], names, strict=True):
        own = [row for row in rows if row.network == network]
        dense = mean([row.top1 for row in own if row.method == DENSE])
        for method in methods(own):
            speedups, top1 = curve(own, method)
            style = "o-" if method in OURS else "x--"
            axes.plot([1.0, *speedups], [dense, *top1], style, label=f"sepc, {method}" if method in OURS else method)
        axes.set_ylim(dense - DEPTH, dense + 0.5)
        axes.set_title(network)
        axes.set_xlabel("times as fast as the dense network, both compiled by sepc")
        axes.set_ylabel("top-1 on 10,000 test images, %, mean over seeds")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def curve(rows: Sequence[Row], method: str) -> tuple[list[float], list[float]]:
    """Measured speed-ups and top-1 of a method, means over seeds, in order."""
    wishes = sorted({row.wanted for row in rows if row.method == method})
    groups = [[row for row in rows if row.method == method and row.wanted == wanted] for wanted in wishes]
    points = sorted((mean([row.speedup for row in group]), mean([row.top1 for row in group])) for group in groups)
    return [speedup for speedup, _ in points], [top1 for _, top1 in points]
