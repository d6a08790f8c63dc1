"""The frame of every kernel: a raw C function over pointers, called by each thread of one parallel region.

    int32_t name(float* p0, …, float* pn, int32_t thread, int32_t threads)

It does its share of the tasks, numbered 0 … tasks-1 and split evenly in order, and returns 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.vector import Expr, Index
from sepc.ir.arithmetic import split_lanes


@dataclass(frozen=True)
class Parameter:
    """A pointer parameter: a flat buffer of `elements` elements."""

    name: str
    elements: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Frame:
    """What the body of a kernel works with: its buffers by parameter name, and this thread's number out of how many."""

    buffers: dict[str, Expr]
    thread: Expr
    threads: Expr

    @property
    def share(self) -> Share:
        """What this thread does of a task."""
        return Share()

    @property
    def one(self) -> Expr:
        """1, in a form from which LLVM cannot tell that it is."""
        return tirx.min(self.threads, 1)

    @contextmanager
    def tasks(self, counts: Sequence[int]) -> Iterator[tuple[Index, ...]]:
        """Loop over this thread's share of the tasks of an index space, outermost dimension first."""
        total = math.prod(counts)
        begin = T.Bind(tirx.truncdiv(self.thread * total, self.threads))
        end = T.Bind(tirx.truncdiv((self.thread + 1) * total, self.threads))
        with T.serial(begin, end) as task:
            yield coordinates(task, counts)


def coordinates(number: Index, counts: Sequence[int]) -> tuple[Index, ...]:
    """The indices of element `number` of an index space, outermost dimension first."""
    indices: list[Index] = []
    for count in reversed(counts):
        if count == 1:
            indices.append(0)
            continue
        last = math.prod(counts[: len(counts) - len(indices) - 1]) == 1
        indices.append(number if last else T.Bind(tirx.truncmod(number, count)))
        if not last:
            number = T.Bind(tirx.truncdiv(number, count))
    return tuple(reversed(indices))


def build_function(parameters: Sequence[Parameter], body: Callable[[Frame], None]) -> Expr:
    """The PrimFunc "kernel" with raw C calling convention, whose statements `body` emits."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("kernel")
        T.func_ret(tvm.ir.PrimType("int32"))
        pointers = [T.arg(p.name, T.handle(p.dtype)) for p in parameters]
        thread, threads = T.arg("thread", T.int32()), T.arg("threads", T.int32())
        T.func_attr({"global_symbol": "kernel", "calling_conv": 1, "tirx.noalias": True})
        buffers = {
            parameter.name: T.decl_buffer((max(1, parameter.elements),), parameter.dtype, data=pointer)
            for parameter, pointer in zip(parameters, pointers, strict=True)
        }
        body(Frame(buffers, thread, threads))
        T.Return(tirx.const(0, "int32"))
    return builder.get()


@contextmanager
def loop(extent: Index) -> Iterator[Index]:
    """A serial loop; nothing but its body where `extent` is the constant 1."""
    if isinstance(extent, int) and extent == 1:
        yield 0
        return
    with T.serial(extent) as index:
        yield index


def for_each_vector(extent: int, lanes: int, body: Callable[[Index, int, int], None], unrolled: int = 1) -> None:
    """Call `body(first, lanes, turn)` for vectors that cover `extent` elements: full ones, then ever narrower ones.

    Full vectors come `unrolled` at a time, their `turn` counting from 0; so does that of the narrower ones.
    """
    step = unrolled * lanes
    if extent >= step:
        with loop(extent // step) as index:
            for turn in range(unrolled):
                body(index * step + turn * lanes, lanes, turn)
    first = extent // step * step
    for turn, width in enumerate(split_lanes(extent - first, lanes)):
        body(first, width, turn)
        first += width


class Share:
    """What a thread does of a task that reduces, and how that comes together: here all of it, by itself."""

    def for_each_vector(
        self, extent: int, lanes: int, body: Callable[[Index, int, int], None], unrolled: int = 1
    ) -> None:
        """`for_each_vector`, of this thread's part."""
        for_each_vector(extent, lanes, body, unrolled)

    @contextmanager
    def positions(self, counts: Sequence[Index]) -> Iterator[tuple[Index, ...]]:
        """Loop over this thread's part of the positions of an index space, outermost dimension first."""
        with ExitStack() as loops:
            yield tuple(loops.enter_context(loop(count)) for count in counts)

    def combined(self, value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """What all who share the task came to, if this thread has come to `value`."""
        return value

    @contextmanager
    def once(self) -> Iterator[None]:
        """For what is done once per task."""
        yield


@contextmanager
def when(condition: Expr | bool) -> Iterator[None]:
    """Emit the body under `condition`; unconditionally where it is known to hold."""
    if isinstance(condition, bool):
        if not condition:
            raise ValueError("a body that never runs must not be emitted")
        yield
        return
    with T.If(condition), T.Then():
        yield


def count_below(limit: int, first: Index, step: int, count: int) -> Index:
    """How many of the `count` positions first, first + step, … are below `limit`.

    By comparisons: TVM 0.27 simplified a quotient here to a wrong constant (kernel with dilation 12, 14 rows in
    tiles of 7), so that no kernel divides what may be negative.
    """
    if step == 1:
        return tirx.max(0, tirx.min(count, limit - first))
    total: Index = 0
    for index in range(count):
        total = total + tirx.Cast("int32", first + index * step < limit)
    return total


def span(tile: Index, size: int, total: int) -> Index:
    """How many of `total` items fall into tile number `tile` of `size` items each; may be zero past the end."""
    if isinstance(tile, int):
        return max(0, min(size, total - tile * size))
    return tirx.max(0, tirx.min(size, total - tile * size))


def tile_span(tile: Index, size: int, total: int, tiles: int) -> Index:
    """`span`, as a constant where all `tiles` tiles are full."""
    return size if tiles * size == total else span(0 if tiles == 1 else tile, size, total)
