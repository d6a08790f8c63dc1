"""The softmax stage, over the contiguous channels of every pixel.

    out[m, c] = exp(in[m, c] − max_m) / Σ_k exp(in[m, k] − max_m)

Three passes over a row that stays in the first-level cache: the maximum, the sum, the result. The exponentials are
computed twice, which takes ten instructions a vector: no memory is needed, and no stage behind waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.dense import Position
from sepc.backends.stages.math import exp
from sepc.backends.stages.normalization import PARTIAL_SUMS, RowwiseStage
from sepc.backends.stages.vector import Accumulator, Expr, Index, broadcast, constant, lanes_of

_LOWEST = float("-inf")


@dataclass(frozen=True)
class SoftmaxStage(RowwiseStage):
    """Emits a softmax."""

    def _pixel(self, pixel: Position) -> None:
        largest = self._largest(pixel)

        def power(x: Expr) -> Expr:
            return exp(x - broadcast(largest, lanes_of(x)))

        inverse = T.Bind(tirx.const(1.0, "float32") / self._reduce(pixel, power))

        def write(channel: Index, lanes: int, turn: int) -> None:
            x = T.Bind(self.source.load_float32((*pixel, channel), lanes))
            self.sink((*pixel, channel), power(x) * broadcast(inverse, lanes))

        self.share.for_each_vector(self.normalization.channels, self.lanes, write, PARTIAL_SUMS)

    def _largest(self, pixel: Position) -> Expr:
        """The largest channel of `pixel`, as a scalar. One that is not a number may be left out: it spoils the sum."""
        registers = [Accumulator(self.lanes) for _ in range(PARTIAL_SUMS)]
        for register in registers:
            register.set(constant(_LOWEST, self.lanes))
        rest = Accumulator(1)
        rest.set(constant(_LOWEST, 1))

        def take(channel: Index, lanes: int, turn: int) -> None:
            value = self.source.load_float32((*pixel, channel), lanes)
            if lanes == self.lanes:
                registers[turn].set(tirx.max(registers[turn].value, value))
                return
            narrow = Accumulator(lanes)
            narrow.set(value)
            rest.set(tirx.max(rest.value, narrow.folded(tirx.max)))

        self.share.for_each_vector(self.normalization.channels, self.lanes, take, PARTIAL_SUMS)
        for register in registers[1:]:
            registers[0].set(tirx.max(registers[0].value, register.value))
        return T.Bind(self.share.combined(tirx.max(rest.value, registers[0].folded(tirx.max)), tirx.max))
