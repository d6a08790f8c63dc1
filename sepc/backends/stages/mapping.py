"""The mapping stage: an elementwise expression, or a copy, over a strided iteration space.

    out[i₀, …, iₙ] = f(in₀[i₀, …, iₙ], in₁[…], …)

The last dimension is vectorised; operands may be broadcast or strided along it. The others are loops, shared by the
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.kernel import Frame, loop, tile_span, when
from sepc.backends.stages.vector import Index
from sepc.cost_model.tiling import RowTiling
from sepc.ir.stage import Map, ceil_div, split_lanes

# Vectors per turn of the innermost loop: hides the latency of a chain of operations.
_VECTORS_PER_TURN = 2


@dataclass(frozen=True)
class MappingStage:
    """Emits `body(position, lanes)` for every vector of the iteration space.

    Attributes:
        mapping: the iteration space. tiling: outer positions per task. lanes: width of a full vector.
        body: loads, computes and stores `lanes` elements along the last dimension from `position` on.
    """

    mapping: Map
    tiling: RowTiling
    lanes: int
    body: Callable[[Sequence[Index], int], None]

    def emit(self, frame: Frame) -> None:
        """The whole iteration space, shared by the threads of `frame`."""
        *outer, inner = self.mapping.extents
        if not outer:
            self._flat(frame, inner)
            return
        tiles = ceil_div(outer[-1], self.tiling.rows)
        with (
            frame.tasks((*outer[:-1], tiles)) as (*leading, tile),
            loop(tile_span(tile, self.tiling.rows, outer[-1], tiles)) as row,
        ):
            self._vectors((*leading, tile * self.tiling.rows + row), 0, inner)

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """The rows from `first` on and before `stop` of an iteration space (batch, row, column, channel)."""
        with T.serial(first, stop) as row, loop(self.mapping.out_width) as column:
            self._vectors((batch, row, column), 0, self.mapping.out_channels)

    def _flat(self, frame: Frame, extent: int) -> None:
        """One dimension only: tasks are chunks of it."""
        chunk = self.lanes * _VECTORS_PER_TURN * self.tiling.rows
        full = extent // chunk
        if full:
            with frame.tasks((full,)) as (tile,):
                self._vectors((), tile * chunk, chunk)
        if extent % chunk:
            with when(frame.thread.equal(frame.threads - 1)):
                self._vectors((), full * chunk, extent % chunk)

    def _vectors(self, leading: tuple[Index, ...], start: Index, extent: int) -> None:
        """`extent` elements along the last dimension from `start` on."""
        step = self.lanes * _VECTORS_PER_TURN
        turns = extent // step
        if turns:
            with loop(turns) as turn:
                for vector in range(_VECTORS_PER_TURN):
                    self.body((*leading, start + turn * step + vector * self.lanes), self.lanes)
        offset = turns * step
        for lanes in split_lanes(extent - offset, self.lanes):
            self.body((*leading, start + offset), lanes)
            offset += lanes
