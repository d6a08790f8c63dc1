"""What came of separating a model: the new one, the plan, and a table of what was done to each layer and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sepc.separable.plan import Plan


@dataclass(frozen=True)
class LayerReport:
    """One convolution, before and after.

    Attributes:
        path: the module's name. form, rank: what it became; "as it was" and 0 if it was left.
        error: the relative error of its results, as a root of mean squares.
        multiply_adds, predicted_us: before and after, for the example's batch.
        reason: why it was left.
    """

    path: str
    form: str
    rank: int
    error: float
    multiply_adds: tuple[int, int]
    predicted_us: tuple[float, float]
    reason: str = ""


@dataclass(frozen=True)
class Separation:
    """The result of `sepc.separate`.

    Attributes:
        model: a copy of the original with layers replaced; with calibration data, linear layers and convolutions behind
            these are fitted anew to make up for them, and all others have the same weights.
        plan: what was replaced by what; `sepc.compile(original, separate=plan)` does it again.
        layers: a row for each convolution that could be replaced, in order.
        left: why each other convolution module could not.
        budget: what was asked for, in words.
        error: of the model's results on the calibration data, relative, as a root of mean squares; not a number
            without calibration data. On other data it is larger, the more the fewer there were to fit to.
        predicted_us: time of the whole model on the target, before and after.
        measured_us: the same as measured here, compiled by sepc, their ratio being the median of many turns' ratios;
            None where the target does not run here.
        reason: why nothing was replaced; empty if something was.
        distilled: what distillation did, in words; empty if there was none.
    """

    model: nn.Module
    plan: Plan
    layers: Sequence[LayerReport]
    left: Mapping[str, str]
    budget: str
    error: float
    predicted_us: tuple[float, float]
    measured_us: tuple[float, float] | None
    reason: str = ""
    distilled: str = ""

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Of the convolutions in `layers`, before and after."""
        before, after = (sum(one.multiply_adds[when] for one in self.layers) for when in (0, 1))
        return before, after

    def __str__(self) -> str:
        """The table, in 120 columns."""
        width = min(40, max([len("layer"), *(len(one.path) for one in self.layers)]))
        head = f"{'layer':{width}}  {'form':19}  {'rank':>5}  {'error':>6}  {'multiply-adds':>21}  {'predicted µs':>19}"
        lines = [f"Separated for {self.budget}.", head, *(_row(one, width) for one in self.layers)]
        lines.append(f"{'all of these':{width}}  {'':19}  {'':5}  {'':6}  {_count_pair(self.multiply_adds)}")
        if self.left:
            lines.append(f"Left as they are: {_grouped(self.left)}.")
        if self.reason:
            lines.append(f"Nothing was replaced: {self.reason}.")
        if not math.isnan(self.error):
            lines.append(f"Relative error of the results on the calibration data: {self.error:.4f}.")
        if self.distilled:
            lines.append(f"Distilled in {self.distilled}.")
        lines.append(f"Predicted for the whole model: {_times(self.predicted_us)}.")
        if self.measured_us is not None:
            lines.append(f"Measured for the whole model: {_times(self.measured_us)}.")
        return "\n".join(line.rstrip() for line in lines)


def _row(one: LayerReport, width: int) -> str:
    path = one.path if len(one.path) <= width else "…" + one.path[1 - width :]
    rank = str(one.rank) if one.rank else ""
    error = f"{one.error:.3f}" if one.rank else ""
    times = f"{one.predicted_us[0]:8.1f} → {one.predicted_us[1]:8.1f}"
    reason = f"  {one.reason}" if one.reason else ""
    return f"{path:{width}}  {one.form:19}  {rank:>5}  {error:>6}  {_count_pair(one.multiply_adds)}  {times}{reason}"


def _count_pair(counts: tuple[int, int]) -> str:
    return f"{counts[0] / 1e6:7.2f} M → {counts[1] / 1e6:7.2f} M"


def _times(times_us: tuple[float, float]) -> str:
    gain = times_us[0] / times_us[1] if times_us[1] else math.nan
    return f"{times_us[0]:.1f} → {times_us[1]:.1f} µs, {gain:.2f} times as fast"


def _grouped(reasons: Mapping[str, str]) -> str:
    paths: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(path)
    return "; ".join(f"{', '.join(own)} ({reason})" for reason, own in paths.items())
