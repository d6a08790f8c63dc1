"""The layer normalisation stage, over the contiguous channels of every pixel.

    out[m, c] = (in[m, c] − mean_m) / √(variance_m + ε) · gain[c] + shift[c]

One by the root of the mean square (RMS) has 0 in place of the mean. Mean and variance are computed in two passes over a
row that stays in the first-level cache: a single pass, by sums of squares, would lose digits. All of it is in float32,
whatever the rows are in.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.dense import Position, Sink
from sepc.backends.stages.kernel import Frame, Share, coordinates, loop, tile_span
from sepc.backends.stages.vector import Accumulator, Expr, Index, Operand, broadcast, cast, constant, lanes_of, ramp
from sepc.cost_model.tiling import RowTiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.element import FLOAT32
from sepc.ir.stage import Normalization

# Partial sums kept per row: enough to hide the latency of the additions.
PARTIAL_SUMS = 4


@dataclass(frozen=True)
class RowwiseStage(ABC):
    """What normalises the channels of every pixel; `source` and the sink's positions are over (batch, row, column,
    channel).
    """

    normalization: Normalization
    tiling: RowTiling
    lanes: int
    source: Operand
    sink: Sink
    share: Share

    def emit(self, frame: Frame) -> None:
        """All pixels, shared by the threads of `frame`."""
        norm = self.normalization
        tiles = ceil_div(norm.pixels, self.tiling.rows)
        with frame.tasks((tiles,)) as (tile,), loop(tile_span(tile, self.tiling.rows, norm.pixels, tiles)) as pixel:
            self._pixel(coordinates(tile * self.tiling.rows + pixel, norm.extents[:-1]))

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """The rows of pixels from `first` on and before `stop`."""
        with T.serial(first, stop) as row, loop(self.normalization.out_width) as column:
            self._pixel((batch, row, column))

    @abstractmethod
    def _pixel(self, pixel: Position) -> None:
        """The channels of one pixel."""

    def _reduce(self, pixel: Sequence[Index], transform: Callable[[Expr], Expr]) -> Expr:
        """The sum of `transform` over the channels of `pixel`, as a scalar."""
        return total(
            self.normalization.channels,
            self.lanes,
            lambda channel, lanes: transform(T.Bind(self.source.load_float32((*pixel, channel), lanes))),
            self.share,
        )


def total(channels: int, lanes: int, vector: Callable[[Index, int], Expr], share: Share | None = None) -> Expr:
    """The sum of all `channels` elements, as a scalar; `vector(first channel, lanes)` gives so many of them.

    `share`: this thread's, if others add up with it.
    """
    share = share or Share()
    partial = [Accumulator(lanes) for _ in range(PARTIAL_SUMS)]
    for register in partial:
        register.set(constant(0, lanes))
    rest = Accumulator(1)
    rest.set(constant(0, 1))

    def add(channel: Index, width: int, turn: int) -> None:
        value = vector(channel, width)
        if width == lanes:
            partial[turn].set(partial[turn].value + value)
            return
        narrow = Accumulator(width)
        narrow.set(value)
        rest.set(rest.value + narrow.sum())

    share.for_each_vector(channels, lanes, add, PARTIAL_SUMS)
    if channels < lanes:
        return T.Bind(share.combined(rest.value, operator.add))
    for register in partial[1:]:
        partial[0].set(partial[0].value + register.value)
    return T.Bind(share.combined(rest.value + partial[0].sum(), operator.add))


def inverse_root(variance: Expr, epsilon: float) -> Expr:
    """1 / √(variance + ε), in each lane."""
    lanes = lanes_of(variance)
    return constant(1.0, lanes) / tirx.sqrt(variance + constant(epsilon, lanes))


@dataclass(frozen=True)
class NormalizationStage(RowwiseStage):
    """Emits a layer or RMS normalisation."""

    gain: Expr | None
    shift: Expr | None

    def _pixel(self, pixel: Position) -> None:
        norm = self.normalization
        scale = tirx.const(1.0 / norm.channels, "float32")
        mean = T.Bind(self._reduce(pixel, lambda x: x) * scale) if norm.subtract_mean else None

        def distance(x: Expr) -> Expr:
            return x if mean is None else T.Bind(x - broadcast(mean, lanes_of(x)))

        def squared_distance(x: Expr) -> Expr:
            apart = distance(x)
            return apart * apart

        variance = self._reduce(pixel, squared_distance) * scale
        inverse = T.Bind(inverse_root(variance, norm.epsilon))

        def write(channel: Index, lanes: int, turn: int) -> None:
            y = distance(self.source.load_float32((*pixel, channel), lanes)) * broadcast(inverse, lanes)
            if self.gain is not None:
                y = y * cast(self.gain[ramp(channel, lanes)], FLOAT32.name)
            if self.shift is not None:
                y = y + cast(self.shift[ramp(channel, lanes)], FLOAT32.name)
            self.sink((*pixel, channel), y)

        self.share.for_each_vector(norm.channels, self.lanes, write, PARTIAL_SUMS)
