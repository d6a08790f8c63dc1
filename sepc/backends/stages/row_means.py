"""Means over each row of what a stage computes, gathered as it computes it: half of a global average pooling.

    means[n, y, 0, c] = Σ_x out[n, y, x, c] / W

The stage must compute each row from left to right, in one task. The means are float32, whatever is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from sepc.backends.stages.vector import Expr, Index, Operand, cast, constant, lanes_of
from sepc.ir.element import FLOAT32


@dataclass(frozen=True)
class RowMeans:
    """Adds vectors to the means of their rows.

    Attributes:
        means: over (batch, row, column, channel), with stride 0 along the columns.
        columns: of a row.
    """

    means: Operand
    columns: int

    def add(self, position: Sequence[Index], value: Expr) -> None:
        """Take the vector `value` at `position`; the first one of a row replaces what was there."""
        lanes = lanes_of(value)
        part = cast(value, FLOAT32.name) * constant(1.0 / self.columns, lanes)
        column = position[2]
        if isinstance(column, int):
            total = self.means.load(position, lanes) + part if column else part
        else:
            total = part + tirx.Select(tirx.EQ(column, 0), constant(0, lanes), self.means.load(position, lanes))
        self.means.store(position, total)
