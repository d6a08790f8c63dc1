"""Several stages over one moving window of rows: what lies between them never leaves the caches.

    v₁ = f₁(x),  v₂ = f₂(v₁),  …,  y = fₙ(vₙ₋₁)

The last link advances `step` rows per turn. Before it, each link computes just the rows that the next one will read and
that are not there yet, into a ring buffer that holds one window of rows. A task computes a run of rows of y; its first
turn fills the windows anew, which is the only work done twice. Rows outside an image do not exist, as in single stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.kernel import Frame, tile_span
from sepc.backends.stages.vector import Index
from sepc.ir.arithmetic import ceil_div
from sepc.ir.stage import Chain, Stage


class RowStage(Protocol):
    """A stage, which can be computed as a whole or a few rows at a time."""

    def emit(self, frame: Frame) -> None:
        """All of it, shared by the threads of `frame`."""

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """The output rows from `first` on and before `stop`, all channels and columns."""


@dataclass(frozen=True)
class ChainStage:
    """Emits a chain.

    Attributes:
        chain: the links. stages: what emits each, with the ring buffers between them as sinks and sources.
        rows: output rows of the last link per task. step: output rows per turn.
    """

    chain: Chain
    stages: Sequence[RowStage]
    rows: int
    step: int

    def emit(self, frame: Frame) -> None:
        """The whole chain, shared by the threads of `frame`."""
        last = self.chain.links[-1]
        tiles = ceil_div(last.out_height, self.rows)
        with frame.tasks((last.batch, tiles)) as (batch, tile):
            begin = tile * self.rows
            rows = tile_span(tile, self.rows, last.out_height, tiles)
            with T.serial(tirx.truncdiv(rows + self.step - 1, self.step)) as turn:
                self._turn(batch, begin, begin + rows, turn)

    def _turn(self, batch: Index, begin: Index, end: Index, turn: Index) -> None:
        """Rows [begin + turn·step, …) of the last link, after what they need of the others."""
        first = T.Bind(begin + turn * self.step)
        stop = T.Bind(tirx.min(end, first + self.step))
        windows: list[tuple[Index, Index]] = [(first, stop)]
        oldest, done, needed = begin, first, stop
        for link in reversed(self.chain.links[1:]):
            # Of the link's input: the first row of the task, the end of the turns before, the end of this turn.
            oldest = tirx.max(0, oldest * link.stride[0] - link.padding[0])
            done, needed = _rows_read(link, done), T.Bind(_rows_read(link, needed))
            start = T.Bind(tirx.Select(tirx.EQ(turn, 0), oldest, done))
            windows.insert(0, (start, tirx.max(start, needed)))
        for stage, (start, end_row) in zip(self.stages, windows, strict=True):
            stage.emit_rows(batch, start, end_row)


def _rows_read(link: Stage, stop: Index) -> Index:
    """How many rows of its input, from the top, `link` reads for its output rows before `stop`."""
    reach = (stop - 1) * link.stride[0] - link.padding[0] + (link.kernel[0] - 1) * link.dilation[0] + 1
    return tirx.max(0, tirx.min(link.in_height, reach))
