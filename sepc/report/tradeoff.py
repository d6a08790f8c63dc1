"""Accuracy against latency: what dense models made separable lose, and what that gains."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sepc.errors import InputError
from sepc.report.plots import save

LEAST: Final = 1e-9

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

    from sepc.separable.result import Separation


@dataclass(frozen=True)
class Curve:
    """Some models made from one by a method.

    Attributes:
        label: the method. points: how many times as fast as the original each is, and its accuracy.
        is_quiet: drawn thinner, as what others are compared with.
    """

    label: str
    points: Sequence[tuple[float, float]]
    is_quiet: bool = False


def draw_tradeoff(axes: Axes, original: float, curves: Sequence[Curve], accuracy: str) -> None:
    """Draw curves that start at the original's accuracy.

    Args:
        axes: where to.
        original: accuracy of the original.
        curves: the other models.
        accuracy: what accuracy is, in words.
    """
    for curve in curves:
        speedups, values = zip((1.0, original), *sorted(curve.points), strict=True)
        axes.plot(speedups, values, "x--" if curve.is_quiet else "o-", label=curve.label)
    axes.axhline(original, color=axes.xaxis.label.get_color(), linewidth=0.8, linestyle=":")
    axes.set_xlabel("times as fast as the original, both compiled by sepc")
    axes.set_ylabel(accuracy)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize="small")


def plot_separations(
    separations: Mapping[str, Sequence[Separation]],
    path: str | os.PathLike[str],
    *,
    original: nn.Module,
    accuracy: Callable[[nn.Module], float],
    label: str = "accuracy",
) -> Path:
    """Draw accuracy against latency of models that `sepc.separate` made of one; returns the path.

    Latencies are measured ones, or predicted where the target does not run here.

    Args:
        separations: results of `sepc.separate` for the same model, target and threads, by what is told of them.
        path: where to; the suffix, ``.svg``, ``.png`` or ``.pdf``, is the format.
        original: the model that they were made of.
        accuracy: called with each model.
        label: what that tells, in words.

    Raises InputError if there is nothing to draw, or for another suffix, SepcError where matplotlib is not installed.
    """
    every = [one for group in separations.values() for one in group]
    if not every:
        raise InputError("There are no separations to draw", where="plot_separations", fix="give results of separate")
    curves = [
        Curve(name, [(_speedup(one), accuracy(one.model)) for one in group]) for name, group in separations.items()
    ]
    before_ms = statistics.median(_times_us(one)[0] for one in every) / 1e3
    dense = accuracy(original)

    def other_unit(values: Any) -> Any:
        """From how many times as fast to milliseconds, or back."""
        return before_ms / np.maximum(values, LEAST)  # Axes ask for 0 as well.

    def draw(axes: Axes) -> None:
        draw_tradeoff(axes, dense, curves, label)
        latency = axes.secondary_xaxis("top", functions=(other_unit, other_unit))
        latency.set_xlabel("ms" if all(one.measured_us for one in every) else "ms, predicted")

    return save(lambda figure: draw(figure.subplots()), Path(path))


def _speedup(separation: Separation) -> float:
    before, after = _times_us(separation)
    return before / after


def _times_us(separation: Separation) -> tuple[float, float]:
    return separation.measured_us or separation.predicted_us
