"""The registers of a dense convolution's innermost loops: columns of outputs times a panel of channels.

A panel's last vectors may be narrower than the others. So that they do not cost as much as these, two columns share a
register there: 14 columns of 24 channels, in vectors of 16, take 14 registers for the first 16 channels and 7 for the
other 8, each with 8 channels of two columns. On other machines such a register may hold one column's several times over
(`sepc.cost_model.tiling.Narrow`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.sums import Sum
from sepc.backends.stages.vector import Expr, broadcast, constant, ramp, repeated
from sepc.cost_model.tiling import RegisterBlock
from sepc.ir.convolution import Convolution


@dataclass(frozen=True)
class _Part:
    """One register: vector number `vector` of the panel, `copies` times over, of each of its one or two `columns`."""

    vector: int
    columns: range
    copies: int
    sum: Sum


@dataclass(frozen=True)
class Registers:
    """The accumulators of a block of `convolution`. `one` is the frame's, to hide masks from LLVM."""

    block: RegisterBlock
    convolution: Convolution
    one: Expr

    @cached_property
    def _parts(self) -> list[_Part]:
        """All registers, those of the first columns first: the vectors of one column are used together."""
        parts = [
            _Part(vector, group, copies, Sum(self.convolution, width * copies * len(group)))
            for vector, width in enumerate(self.block.panel)
            for group in self.block.column_groups(width)
            for copies in [self.block.copies(width)]
        ]
        return sorted(parts, key=lambda part: (part.columns.stop, part.vector))

    @cached_property
    def offsets(self) -> list[int]:
        """The first channel of each vector, counted from that of the panel."""
        return [sum(self.block.panel[:vector]) for vector in range(len(self.block.panel))]

    def start(self, initial: Sequence[Expr] | None) -> None:
        """Set every column to the `initial` vectors, or to 0."""
        copies = None if initial is None else _Copies(initial)
        for part in self._parts:
            part.sum.start(None if copies is None else copies.of(part))

    def multiply_add(self, inputs: Sequence[Expr | None], weights: Sequence[Expr]) -> None:
        """Add `inputs`, one scalar for each column, times the vectors of `weights`; None is a column left out."""
        copies = _Copies(weights)
        for part in self._parts:
            own = [inputs[column] for column in part.columns]
            if any(value is not None for value in own):
                part.sum.add(self._side_by_side(own, part.sum.lanes), copies.of(part))

    def end_block(self) -> None:
        """A block of the sums has been added: see `sepc.backends.stages.sums`."""
        for part in self._parts:
            part.sum.end_block()

    def _side_by_side(self, scalars: Sequence[Expr | None], lanes: int) -> Expr:
        """A vector of one or two equal parts, each of which holds one of the `scalars`, or 0.

        By a mask that LLVM does not know: one that it knows becomes a permutation of broadcasts, which competes with
        multiply-adds for their units (144→24 channels on 56², Zen 5: 106 µs, by a mask 95).
        """
        element = self.convolution.element.name
        vectors = [constant(0, lanes, element) if scalar is None else broadcast(scalar, lanes) for scalar in scalars]
        if len(vectors) == 1:
            return vectors[0]
        is_first = ramp(0, lanes) < broadcast(self.one * (lanes // 2), lanes)
        return tirx.Select(is_first, *vectors)

    def results(self) -> Iterator[tuple[int, int, Expr]]:
        """Each vector of each column: the column, the offset of its first channel, and its value."""
        for part in self._parts:
            width = self.block.panel[part.vector]
            for place, column in enumerate(part.columns):
                value = part.sum.value
                if part.sum.lanes > width:
                    lanes = range(place * width, (place + 1) * width)
                    value = tirx.Shuffle([value], [tirx.const(lane, "int32") for lane in lanes])
                yield column, self.offsets[part.vector], value


class _Copies:
    """Vectors of a panel, each as many times over as registers hold them."""

    def __init__(self, vectors: Sequence[Expr]) -> None:
        self._vectors = vectors
        self._repeated: dict[tuple[int, int], Expr] = {}

    def of(self, part: _Part) -> Expr:
        """The vector of the panel that belongs to `part`."""
        vector, copies = self._vectors[part.vector], part.copies * len(part.columns)
        if copies == 1:
            return vector
        key = part.vector, copies
        if key not in self._repeated:
            self._repeated[key] = T.Bind(repeated(vector, copies))
        return self._repeated[key]
