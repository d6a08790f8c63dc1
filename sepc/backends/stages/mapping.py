"""The mapping stage: an elementwise expression, or a copy, over a strided iteration space.

    out[i₀, …, iₙ] = f(in₀[i₀, …, iₙ], in₁[…], …)

The last dimension is vectorised; operands may be broadcast or strided along it. The others are loops, shared by the
threads. Where an operand lies along the last dimension but one instead, as in a copy from channels-first to
channels-last, square tiles of vectors are loaded along that, and transposed in registers: so that both sides are read
and written in whole cache lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.kernel import Frame, for_each_vector, loop, tile_span, when
from sepc.backends.stages.vector import Expr, Index
from sepc.cost_model.tiling import RowTiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.stage import Map

# Vectors per turn of the innermost loop: hides the latency of a chain of operations.
_VECTORS_PER_TURN = 2
_TILES_PER_TASK = 16
"""Tiles side by side: 64 KiB read and written per task, for vectors of 16."""
_LEAST_TILE = 4


def _spans(index: Index, count: int, extent: int, size: int) -> list[tuple[Expr | bool, int]]:
    """The cases of block number `index` of `count` blocks of `size` out of `extent`: when, and how long it is."""
    rest = extent - (count - 1) * size
    if rest == size or count == 1:
        return [(True, rest)]
    return [(index < count - 1, size), (tirx.EQ(index, count - 1), rest)]


@dataclass(frozen=True)
class MappingStage:
    """Emits `body(position, lanes)` for every vector of the iteration space.

    Attributes:
        mapping: the iteration space. tiling: outer positions per task. lanes: width of a full vector.
        body: loads, computes and stores `lanes` elements along the last dimension from `position` on.
        tile: the same of as many of these as lie side by side along the dimension before; None where that is no gain.
    """

    mapping: Map
    tiling: RowTiling
    lanes: int
    body: Callable[[Sequence[Index], int], None]
    tile: Callable[[Sequence[Index], int], None] | None = None

    def emit(self, frame: Frame) -> None:
        """The whole iteration space, shared by the threads of `frame`."""
        *outer, inner = self.mapping.extents
        if self.tile is not None:
            self._tiles(frame, self.tile)
            return
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

    def _tiles(self, frame: Frame, tile: Callable[[Sequence[Index], int], None]) -> None:
        """Tasks are blocks of rows as high as a vector is long."""
        *leading, rows, columns = self.mapping.extents
        high, wide = min(rows, self.lanes), min(columns, _TILES_PER_TASK * self.lanes)
        counts = (ceil_div(rows, high), ceil_div(columns, wide))
        with frame.tasks((*leading, *counts)) as (*outer, down, across):
            for down_here, height in _spans(down, counts[0], rows, high):
                with when(down_here):
                    for across_here, width in _spans(across, counts[1], columns, wide):
                        with when(across_here):
                            self._block(tile, tuple(outer), (down * high, height), (across * wide, width), self.lanes)

    def _block(
        self,
        tile: Callable[[Sequence[Index], int], None],
        outer: tuple[Index, ...],
        rows: tuple[Index, int],
        columns: tuple[Index, int],
        width: int,
    ) -> None:
        """The block of `rows` and `columns`, each given by its first and how many, in square tiles of up to `width`."""
        (top, height), (left, extent) = rows, columns
        if width < _LEAST_TILE:
            with loop(height) as row:
                self._vectors((*outer, top + row), left, extent)
            return
        down, across = height // width, extent // width
        covered = across * width
        if down and across:
            with loop(across) as i, loop(down) as j:
                tile((*outer, top + j * width, left + i * width), width)
        if across and height % width:
            self._block(tile, outer, (top + down * width, height % width), (left, covered), width // 2)
        if extent % width:
            self._block(tile, outer, rows, (left + covered, extent % width), width // 2)

    def _vectors(self, leading: tuple[Index, ...], start: Index, extent: int) -> None:
        """`extent` elements along the last dimension from `start` on."""

        def at(offset: Index, lanes: int, turn: int) -> None:
            self.body((*leading, start + offset), lanes)

        for_each_vector(extent, self.lanes, at, _VECTORS_PER_TURN)
