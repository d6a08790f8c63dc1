"""What is told of a compiled model: its regions, and how long each takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sepc.runtime.gpu import Resources


@dataclass(frozen=True)
class RegionReport:
    """One region of a compiled model: a kernel, or a part that PyTorch runs.

    Attributes:
        name: the region's name. kind: what it hangs on. ops: the ATen operators inside, in order.
        kernel: who runs it: "sepc", "tvm" or "torch". reason: why it is not a kernel of ours.
        tiling: the chosen blocking; empty where there is none.
        predicted_us: the cost model's time, in microseconds (0 for regions without a kernel of ours).
        bottleneck: what that time is spent on: "compute", or a memory level; empty where there is no prediction.
        bytes_moved: compulsory traffic in bytes: inputs, weights, result. flops: floating-point operations.
        symbols: names of its functions in the library.
        resources: what each of them takes, on an NVIDIA GPU.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    kernel: str
    reason: str
    tiling: str
    predicted_us: float
    bottleneck: str
    bytes_moved: int
    flops: int
    symbols: tuple[str, ...]
    resources: tuple[Resources, ...] = ()


@dataclass(frozen=True)
class RegionProfile:
    """How long a region took: `measured_us`, a median, beside the prediction, both in microseconds.

    The other fields are those of `RegionReport`; `predicted_us` is 0 and `bottleneck` empty where nothing is predicted.
    """

    name: str
    kind: str
    kernel: str
    measured_us: float
    predicted_us: float
    bottleneck: str


class Profile(tuple[RegionProfile, ...]):
    """The regions of a model in execution order, each with its time. It prints as a table, with totals."""

    __slots__ = ()

    @classmethod
    def of(cls, regions: Iterable[RegionReport], measured_us: Mapping[str, float]) -> Profile:
        """The profile of `regions`, with a time for the name of each."""
        return cls(
            RegionProfile(
                name=one.name,
                kind=one.kind,
                kernel=one.kernel,
                measured_us=measured_us[one.name],
                predicted_us=one.predicted_us,
                bottleneck=one.bottleneck,
            )
            for one in regions
        )

    @property
    def measured_us(self) -> float:
        """The sum over all regions, in microseconds."""
        return sum(row.measured_us for row in self)

    @property
    def predicted_us(self) -> float:
        """The sum over the regions that have a prediction, in microseconds."""
        return sum(row.predicted_us for row in self)

    def __str__(self) -> str:
        """A table: one line per region, and the sums; the last columns compare only what has a prediction."""
        width = max([len(row.name) for row in self] + [len("region")])
        head = f"{'region':{width}}  {'kind':13}  {'by':5}  {'measured µs':>11}  {'predicted µs':>12}  {'ratio':>5}"
        lines = [f"{head}  bottleneck"]
        lines += [
            f"{row.name:{width}}  {row.kind:13}  {row.kernel:5}  {row.measured_us:11.1f}  "
            f"{_comparison(row.measured_us, row.predicted_us)}  {row.bottleneck}".rstrip()
            for row in self
        ]
        compared_us = sum(row.measured_us for row in self if row.predicted_us)
        lines.append("-" * len(lines[0]))
        label = f"{len(self)} regions"
        lines.append(
            f"{label:{width}}  {'':13}  {'':5}  {self.measured_us:11.1f}  {_comparison(compared_us, self.predicted_us)}"
        )
        if compared_us < self.measured_us:
            lines.append(f"The ratio is that of {compared_us:.1f} µs; the other regions have no prediction.")
        return "\n".join(lines)


def _comparison(measured_us: float, predicted_us: float) -> str:
    """The predicted time, and measured to predicted; dashes where nothing is predicted."""
    if not predicted_us:
        return f"{'–':>12}  {'–':>5}"
    return f"{predicted_us:12.1f}  {measured_us / predicted_us:5.2f}"
