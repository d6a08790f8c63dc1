"""The stage of a transposed convolution: its phases one after the other, each writing every s-th result.

    out[n, y·s + r, x·s + q, o] = phase(r, q)[n, y, x, o]

The phases (`sepc.ir.phases`) write different results, so that threads need not wait for each other between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sepc.backends.stages.chain import RowStage
from sepc.backends.stages.dense import Sink
from sepc.backends.stages.kernel import Frame
from sepc.backends.stages.vector import Expr, Index
from sepc.errors import VerificationError
from sepc.ir.phases import Interleaved, Phase


@dataclass(frozen=True)
class InterleavedStage:
    """Emits all phases. `stages` compute one each, and hand what they have computed to an `interleaving` sink."""

    stages: Sequence[RowStage]

    def emit(self, frame: Frame) -> None:
        """The whole transposed convolution, shared by the threads of `frame`."""
        for stage in self.stages:
            stage.emit(frame)

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """Not to be had: a row is of several phases, and no link of a chain is one."""
        raise VerificationError("A transposed convolution cannot be computed a few rows at a time")


def interleaving(stage: Interleaved, phase: Phase, sink: Sink) -> Sink:
    """A sink for `phase`, which hands its results to `sink` under their positions in the whole."""

    def finish(position: Sequence[Index], value: Expr) -> None:
        sink(stage.position(phase, position), value)

    return finish
