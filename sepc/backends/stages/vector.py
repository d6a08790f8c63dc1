"""Vector expressions of tirx: constants, ramps, lane counts, and loads and stores through strided operands."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

# TVM's Python classes carry no types; an expression or buffer of its is an `Expr` here.
Expr = Any
Index = Any  # a Python int (known while the kernel is generated) or an int32 expression


FloatArray = NDArray[np.floating[Any]]

LINE_BYTES = 64
# float32 values in a cache line.
LINE_FLOATS = 16


def constant(value: float, lanes: int, dtype: str = "float32") -> Expr:
    """`value` in each of `lanes` lanes."""
    scalar = tirx.const(value, dtype)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def broadcast(scalar: Expr, lanes: int) -> Expr:
    """`scalar` in each of `lanes` lanes."""
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def repeated(vector: Expr, copies: int) -> Expr:
    """The lanes of `vector` so many times over."""
    return vector if copies == 1 else _shuffle([vector] * copies, range(copies * lanes_of(vector)))


def ramp(base: Index, lanes: int, stride: int = 1) -> Expr:
    """Indices base, base+stride, … for `lanes` lanes."""
    return base if lanes == 1 else tirx.Ramp(base, stride, lanes)


def lanes_of(value: Expr) -> int:
    """Number of lanes of a vector expression."""
    return int(value.ty.dtype.lanes)


def type_of(value: Expr) -> str:
    """The type of each lane of a vector expression."""
    return str(value.ty.dtype).partition("x")[0]


def cast(value: Expr, dtype: str) -> Expr:
    """`value` with each lane converted to `dtype`."""
    if type_of(value) == dtype:
        return value
    lanes = lanes_of(value)
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def line_elements(buffer: Expr) -> int:
    """Elements of `buffer` in a cache line."""
    return LINE_BYTES // element_bytes(buffer)


def element_bytes(buffer: Expr) -> int:
    """Bytes of an element of `buffer`."""
    return np.dtype(str(buffer.dtype)).itemsize


@dataclass(frozen=True)
class Operand:
    """A tensor as a kernel sees it: a flat buffer, and strides in elements over the kernel's iteration dimensions.

    Attributes:
        buffer: flat tirx buffer, or a local scratch buffer.
        strides: one stride per iteration dimension; 0 where the tensor is broadcast.
        offset: elements to skip at the front (an `Index`).
    """

    buffer: Expr
    strides: tuple[int, ...]
    offset: Index = 0

    def at(self, position: Sequence[Index]) -> Index:
        """Flat element index of `position`."""
        index = self.offset
        for coordinate, stride in zip(position, self.strides, strict=True):
            if stride != 0 and not (isinstance(coordinate, int) and coordinate == 0):
                index = index + coordinate * stride
        return index

    def load(self, position: Sequence[Index], lanes: int = 1, axis: int = -1) -> Expr:
        """`lanes` neighbours along iteration dimension `axis`, starting at `position`."""
        index, stride = self.at(position), self.strides[axis]
        if lanes == 1 or stride == 0:
            return broadcast(self.buffer[index], lanes)
        return self.buffer[ramp(index, lanes, stride)]

    def load_each(self, position: Sequence[Index], count: int) -> list[Expr]:
        """`count` neighbours along the last dimension as scalars; if there are several, out of one register."""
        if count == 1:
            return [self.load(position)]
        vector = T.Bind(self.load(position, count))
        return [_shuffle([vector], [lane]) for lane in range(count)]

    def load_float32(self, position: Sequence[Index], lanes: int = 1) -> Expr:
        """The same along the last dimension, converted to float32."""
        return cast(self.load(position, lanes), "float32")

    def prefetch(self, position: Sequence[Index], elements: int, *, write: bool = False) -> None:
        """Have `elements` neighbours along the last iteration dimension, from `position` on, fetched, or to write."""
        for element in range(0, elements, line_elements(self.buffer)):
            prefetch(self.buffer, self.at(position) + element, write=write)

    @property
    def is_by_pixels(self) -> bool:
        """Whether it has channels side by side, and those of other pixels elsewhere."""
        return self.strides[-1] == 1 and self.strides[-2] > 1

    def store(self, position: Sequence[Index], value: Expr, axis: int = -1) -> None:
        """Write the lanes of `value` along iteration dimension `axis`, starting at `position`."""
        T.buffer_store(self.buffer, value, [ramp(self.at(position), lanes_of(value), self.strides[axis])])


@dataclass(frozen=True)
class Ring(Operand):
    """A buffer over (batch, row, column, channel) that keeps the last `rows` rows of one image."""

    rows: int = 1

    def prefetch(self, position: Sequence[Index], elements: int, *, write: bool = False) -> None:
        """Nothing: its rows are in the caches."""

    def at(self, position: Sequence[Index]) -> Index:
        """Flat element index of `position`: rows wrap around, the image does not matter."""
        _, row, *rest = position
        wrapped = row % self.rows if isinstance(row, int) else tirx.truncmod(row, self.rows)
        return super().at((0, wrapped, *rest))


def prefetch(buffer: Expr, index: Index, *, outer: bool = False, write: bool = False) -> None:
    """Have the cache line of element `index` of `buffer` fetched; an index past the end does no harm.

    Into all cache levels; or into the `outer` ones, not the first. To `write` it, or read.
    """
    # Operands: whether for writing, the locality, data.
    where, locality = T.address_of(buffer[index]), 2 if outer else 3
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", where, int(write), locality, 1))


def transpose(rows: Sequence[Expr]) -> list[Expr]:
    """As many vectors as each has lanes (a power of two), with rows and columns exchanged.

    Blocks of 1, 2, 4, … lanes change places with those of the row so many below.
    """
    vectors, lanes, step = list(rows), len(rows), 1
    while step < lanes:
        high = [lane & step != 0 for lane in range(lanes)]
        upper = [lanes + lane - step if high[lane] else lane for lane in range(lanes)]
        lower = [lanes + lane if high[lane] else lane + step for lane in range(lanes)]
        for row in range(lanes):
            if not row & step:
                pair = [vectors[row], vectors[row + step]]
                vectors[row], vectors[row + step] = (T.Bind(_shuffle(pair, order)) for order in (upper, lower))
        step *= 2
    return vectors


def _shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """A vector of the given lanes out of those of all `vectors`, counted through."""
    return tirx.Shuffle(list(vectors), [tirx.const(lane, "int32") for lane in lanes])


class Accumulator:
    """A vector register: a small local buffer that LLVM keeps in a register, as all its indices are constants.

    It may hold its `lanes` several times over (`copies`): see `sepc.cost_model.tiling.RegisterBlock.copies`.
    """

    def __init__(self, lanes: int, dtype: str = "float32", copies: int = 1) -> None:
        self.lanes, self.copies = lanes, copies
        self._buffer = T.alloc_buffer((lanes * copies,), dtype)

    @property
    def value(self) -> Expr:
        """The current contents."""
        return self._buffer[ramp(0, self.lanes)]

    def set(self, value: Expr) -> None:
        """Replace the contents."""
        T.buffer_store(self._buffer, repeated(value, self.copies), [ramp(0, self.lanes * self.copies)])

    def multiply_add(self, left: Expr, right: Expr) -> None:
        """Add a product; the factors are scalars, to be broadcast, or have all lanes of all copies."""
        every = ramp(0, self.lanes * self.copies)
        left, right = (broadcast(one, self.lanes * self.copies) if lanes_of(one) == 1 else one for one in (left, right))
        T.buffer_store(self._buffer, self._buffer[every] + left * right, [every])

    def sum(self) -> Expr:
        """All lanes added up, by halves, as a scalar. Overwrites the contents."""
        return self.folded(operator.add)

    def folded(self, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """All lanes combined, by halves, to a scalar. Overwrites the contents."""
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            folded = combine(self._buffer[ramp(0, lanes)], self._buffer[ramp(lanes, lanes)])
            T.buffer_store(self._buffer, folded, [ramp(0, lanes)])
        return self._buffer[0]
