"""The pooling stage: maximum or average over a window, per channel; regular, adaptive and global.

    out[n, y, x, c] = reduce over rows r ∈ R(y) and columns q ∈ Q(x) of in[n, r, q, c]

Windows are clipped to the input, so padding costs nothing. A few channel vectors are reduced at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from math import prod

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.dense import Sink
from sepc.backends.stages.kernel import Frame, Share, count_below, loop, tile_span
from sepc.backends.stages.lanewise import channel_tiles, for_each_channel_group
from sepc.backends.stages.math import maximum
from sepc.backends.stages.vector import Accumulator, Expr, Index, Operand, broadcast, cast, constant
from sepc.cost_model.tiling import LaneTiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.element import FLOAT32
from sepc.ir.stage import Pooling

_LOWEST = float("-inf")


@dataclass(frozen=True)
class _Window:
    """Input positions of one output position along one axis: `count` of them from `begin`, `step` apart."""

    begin: Index
    count: Index
    step: int
    divisor: Index


@dataclass(frozen=True)
class _Axis:
    """A dimension of a pooling: its sizes, and what `Pooling` says of it."""

    size: int
    out: int
    kernel: int
    stride: int
    padding: int
    dilation: int


def _axes(pool: Pooling) -> list[_Axis]:
    """The dimensions of a pooling: planes (of one with depth), rows, columns."""
    options = zip(pool.kernel, pool.stride, pool.padding, pool.dilation, strict=True)
    sizes = ((pool.in_height, pool.out_height), (pool.in_width, pool.out_width))
    flat = [_Axis(*size, *option) for size, option in zip(sizes, options, strict=True)]
    return flat if pool.depth is None else [_Axis(*astuple(pool.depth)), *flat]


def _window(pooling: Pooling, axis: _Axis, position: Index) -> _Window:
    size = axis.size
    if pooling.adaptive:
        out = axis.out
        if out == 1:
            return _Window(0, size, 1, size)
        begin = T.Bind(tirx.truncdiv(position * size, out))
        count = T.Bind(tirx.truncdiv((position + 1) * size + out - 1, out) - begin)
        return _Window(begin, count, 1, count)
    kernel, step, padding = axis.kernel, axis.dilation, axis.padding
    first = position * axis.stride - padding
    skipped = T.Bind(count_below(0, first, step, kernel))
    end = T.Bind(count_below(size, first, step, kernel))
    count = T.Bind(tirx.max(0, end - skipped))
    padded = tirx.min(first + kernel, size + padding) - first
    return _Window(T.Bind(first + skipped * step), count, step, padded if pooling.include_padding else count)


@dataclass(frozen=True)
class PoolingStage:
    """Emits a pooling. `source` and the sink's positions are over (batch, row, column, channel)."""

    pooling: Pooling
    tiling: LaneTiling
    lanes: int
    source: Operand
    sink: Sink
    share: Share

    def emit(self, frame: Frame) -> None:
        """The whole pooling, shared by the threads of `frame`."""
        pool, tiling = self.pooling, self.tiling
        row_tiles = ceil_div(pool.out_height, tiling.rows)
        tiles = channel_tiles(pool.channels, self.lanes, tiling.vectors, tiling.groups)
        with frame.tasks((*pool.leading, row_tiles, tiles)) as (*image, row_tile, tile):

            def body(channel: Index, widths: tuple[int, ...]) -> None:
                rows = tile_span(row_tile, tiling.rows, pool.out_height, row_tiles)
                with loop(rows) as row_in_tile, loop(pool.out_width) as column:
                    self._window((*image, row_tile * tiling.rows + row_in_tile, column), channel, widths)

            for_each_channel_group(pool.channels, self.lanes, tiling.vectors, tiling.groups, tile, tiles, body)

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """The output rows from `first` on and before `stop`, all channels and columns."""
        pool, vectors = self.pooling, self.tiling.vectors

        def body(channel: Index, widths: tuple[int, ...]) -> None:
            with T.serial(first, stop) as row, loop(pool.out_width) as column:
                self._window((batch, row, column), channel, widths)

        all_groups = ceil_div(pool.channels, self.lanes * vectors)
        for_each_channel_group(pool.channels, self.lanes, vectors, all_groups, 0, 1, body)

    def _window(self, pixel: tuple[Index, ...], channel: Index, widths: tuple[int, ...]) -> None:
        """Reduce one window for the channel vectors `widths` from `channel` on."""
        pool = self.pooling
        combine: Callable[[Expr, Expr], Expr] = maximum if pool.maximum else _add
        # Averages are summed up in float32, whatever is averaged.
        element = pool.element.name if pool.maximum else FLOAT32.name
        registers = [Accumulator(lanes, element) for lanes in widths]
        for register in registers:
            register.set(constant(_LOWEST if pool.maximum else 0, register.lanes, element))
        windows = [_window(pool, axis, position) for axis, position in zip(_axes(pool), pixel[1:], strict=True)]
        with self.share.positions([one.count for one in windows]) as places:
            read = [one.begin + place * one.step for one, place in zip(windows, places, strict=True)]
            offset = 0
            for register in registers:
                position = (pixel[0], *read, channel + offset)
                register.set(combine(register.value, cast(self.source.load(position, register.lanes), element)))
                offset += register.lanes
        offset = 0
        for register in registers:
            value = self.share.combined(register.value, combine)
            with self.share.once():
                if not pool.maximum:
                    value = value * self._reciprocal(windows, register.lanes)
                self.sink((*pixel, channel + offset), value)
            offset += register.lanes

    def _reciprocal(self, windows: Sequence[_Window], lanes: int) -> Expr:
        count = self.pooling.divisor or prod([window.divisor for window in windows], start=1)
        if isinstance(count, int):
            return constant(1.0 / count, lanes)
        return broadcast(T.Bind(tirx.const(1.0, "float32") / tirx.Cast("float32", count)), lanes)


def _add(left: Expr, right: Expr) -> Expr:
    return left + right
