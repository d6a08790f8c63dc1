"""The group normalisation stage, over all pixels of an image and runs of its channels, in two kernels.

    out[n, p, c] = (in[n, p, c] − mean[n, g]) / √(variance[n, g] + ε) · gain[c] + shift[c],    g = group of channel c

Threads share the pixels of an image, so there are two phases, and a barrier between them:

1. statistics: each task finds, for every channel, the mean of its pixels and the sum of squared distances from that;
2. results: each task merges what all tasks found of its image, then the channels of each group, and normalises its own
   pixels.

A sum of squares would lose digits where the mean is far from zero. So a task takes a few pixels at a time, which stay
in the first-level cache, finds their mean m_b and squared distances d_b, and merges these (Chan, Golub & LeVeque 1979,
'Updating formulae and a pairwise algorithm for computing sample variances'): with n elements before and k new ones,

    δ = m_b − m,    m ← m + δ · k / (n + k),    d ← d + d_b + δ² · n · k / (n + k)

All of it is in float32, whatever the image is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.dense import Position, Sink
from sepc.backends.stages.kernel import Frame, coordinates, for_each_vector, tile_span
from sepc.backends.stages.lanewise import for_each_channel_group
from sepc.backends.stages.normalization import inverse_root, total
from sepc.backends.stages.vector import LINE_FLOATS, Accumulator, Expr, Index, Operand, broadcast, cast, constant, ramp
from sepc.cost_model.loops import set_share
from sepc.cost_model.tiling import RowTiling
from sepc.errors import VerificationError
from sepc.ir.arithmetic import ceil_div
from sepc.ir.element import FLOAT32
from sepc.ir.group_normalization import GroupNormalization

BLOCK_PIXELS = 16
"""Pixels whose mean is found before they are read again: 8 vectors of 16 channels of each take 8 KiB."""
STRIDED_BLOCK_PIXELS = 8
"""The same where they fall into less than half of the first-level cache's sets, as vectors of very many channels do.

Statistics on a Zen 5 core, 28²×256 / 14²×512 / 7²×2048: 7.6 / 4.1 / 5.8 µs with 16, 9.0 / 3.1 / 3.6 µs with 8.
"""
PIXELS_TOGETHER = 4
"""Pixels that are normalised together: mean, scale and shift of a vector of channels are loaded once for them."""


def padded_channels(stage: GroupNormalization) -> int:
    """Elements that a value per channel takes, in whole cache lines."""
    return ceil_div(stage.channels, LINE_FLOATS) * LINE_FLOATS


def partial_elements(stage: GroupNormalization, tiling: RowTiling) -> int:
    """Elements of scratch for what the tasks of the first phase find: [image][task][mean, squares][channel]."""
    return stage.images * ceil_div(stage.pixels, tiling.rows) * 2 * padded_channels(stage)


def thread_elements(stage: GroupNormalization) -> int:
    """Elements of scratch that each thread needs in the second phase: [mean, scale][channel]."""
    return 2 * padded_channels(stage)


@dataclass(frozen=True)
class _Phase:
    """What both phases have: `source` is over (image, pixel…, channel), `partial` is what the first one finds."""

    stage: GroupNormalization
    tiling: RowTiling
    lanes: int
    source: Operand
    partial: Expr

    @cached_property
    def tiles(self) -> int:
        """Tasks per image."""
        return ceil_div(self.stage.pixels, self.tiling.rows)

    @contextmanager
    def tasks(self, frame: Frame) -> Iterator[tuple[Index, Index, Index]]:
        """The tasks of this thread: image, tile, and how many pixels it has."""
        with frame.tasks((self.stage.images, self.tiles)) as (image, tile):
            count = tile_span(tile, self.tiling.rows, self.stage.pixels, self.tiles)
            yield image, tile, count if isinstance(count, int) else T.Bind(count)

    def pixel(self, image: Index, number: Index) -> Position:
        """The position of pixel `number` of `image`, without the channel."""
        return (image, *coordinates(number, self.stage.extents[1:-1]))

    def found(self, image: Index, tile: Index) -> tuple[Index, Index]:
        """Where in `partial` the means and the squared distances lie that a task has found."""
        padded = padded_channels(self.stage)
        base = T.Bind((image * self.tiles + tile) * (2 * padded))
        return base, base + padded


@dataclass(frozen=True)
class StatisticsStage(_Phase):
    """Emits the first phase."""

    def emit(self, frame: Frame) -> None:
        """Statistics of all images, shared by the threads of `frame`."""
        with self.tasks(frame) as (image, tile, count):
            means, squares = self.found(image, tile)
            for_each_vector(self.stage.channels, self.lanes, lambda c, n, _: self._clear((means + c, squares + c), n))
            pixels = self._block_pixels
            with T.serial(tirx.truncdiv(count + (pixels - 1), pixels)) as block:
                before = T.Bind(block * pixels)
                size = T.Bind(tirx.min(count - before, pixels))
                self._block(image, tile * self.tiling.rows + before, before, size, (means, squares))

    def _clear(self, starts: Sequence[Index], lanes: int) -> None:
        for start in starts:
            T.buffer_store(self.partial, constant(0, lanes), [ramp(start, lanes)])

    def _block(self, image: Index, first: Index, before: Index, size: Index, found: tuple[Index, Index]) -> None:
        """Merge the statistics of `size` pixels from `first` on into what was `found` of the `before` ones."""
        one, seen = tirx.const(1.0, "float32"), tirx.Cast("float32", before)
        per_pixel = T.Bind(one / tirx.Cast("float32", size))
        part = T.Bind(tirx.Cast("float32", size) / tirx.Cast("float32", before + size))

        def body(channel: Index, widths: tuple[int, ...]) -> None:
            sums = self._sums(image, first, size, channel, widths, lambda x, _: x)
            own = [T.Bind(value * broadcast(per_pixel, n)) for value, n in zip(sums, widths, strict=True)]
            distances = self._sums(image, first, size, channel, widths, lambda x, i: _square(x - own[i]))
            for index, lanes in enumerate(widths):
                mean, squares = (ramp(at + channel + sum(widths[:index]), lanes) for at in found)
                delta = T.Bind(own[index] - self.partial[mean])
                step = T.Bind(delta * broadcast(part, lanes))
                # Not δ² · n: that overflows where n is 0.
                apart = step * (delta * broadcast(seen, lanes))
                T.buffer_store(self.partial, self.partial[squares] + (distances[index] + apart), [squares])
                T.buffer_store(self.partial, self.partial[mean] + step, [mean])

        vectors = self._vectors_together
        for_each_channel_group(
            self.stage.channels, self.lanes, vectors, self.stage.channels // (self.lanes * vectors), 0, 1, body
        )

    @property
    def _block_pixels(self) -> int:
        """Pixels that a block takes."""
        run = min(self.stage.channels, self.lanes * self._vectors_together)
        return BLOCK_PIXELS if set_share(run, self.stage.channels, self.stage.element) >= 0.5 else STRIDED_BLOCK_PIXELS

    @property
    def _vectors_together(self) -> int:
        """Sums held in registers: of 16 registers of 8 lanes, 4 also leave room for means; of 32, 8 do."""
        per_float32 = self.stage.element.per_float32  # A vector of narrower numbers is several of float32.
        return max(1, self.lanes // (2 * per_float32**2))

    def _sums(
        self,
        image: Index,
        first: Index,
        size: Index,
        channel: Index,
        widths: tuple[int, ...],
        transform: Callable[[Expr, int], Expr],
    ) -> list[Expr]:
        """The sums of `transform(vector, its number)` over the pixels, for vectors of `widths` from `channel` on.

        Of few vectors several sums are kept, each of every so manieth pixel: to hide the latency of the additions.
        """
        copies = max(1, self._vectors_together // len(widths))
        registers = [[Accumulator(lanes) for lanes in widths] for _ in range(copies)]
        for own in registers:
            for register in own:
                register.set(constant(0, register.lanes))

        def add(number: Index, own: list[Accumulator]) -> None:
            pixel, offset = self.pixel(image, number), 0
            for index, register in enumerate(own):
                value = T.Bind(self.source.load_float32((*pixel, channel + offset), register.lanes))
                register.set(register.value + transform(value, index))
                offset += register.lanes

        with T.serial(tirx.truncdiv(size, copies)) as step:
            for copy, own in enumerate(registers):
                add(first + step * copies + copy, own)
        if copies > 1:
            with T.serial(tirx.truncmod(size, copies)) as rest:
                add(first + (size - 1 - rest), registers[0])
        for own in registers[1:]:
            for into, register in zip(registers[0], own, strict=True):
                into.set(into.value + register.value)
        return [T.Bind(register.value) for register in registers[0]]


@dataclass(frozen=True)
class GroupNormalizationStage(_Phase):
    """Emits the second phase; `merged` is each thread's memory for mean and scale of every channel."""

    merged: Operand
    gain: Expr | None
    shift: Expr | None
    sink: Sink

    def emit(self, frame: Frame) -> None:
        """All results, shared by the threads of `frame`."""
        with self.tasks(frame) as (image, tile, count):
            self._merge_tasks(image)
            if self.stage.group_channels == 1:
                for_each_vector(self.stage.channels, self.lanes, lambda c, n, _: self._scale_channels(c, n))
            else:
                with T.serial(self.stage.groups) as group:
                    self._merge_channels(T.Bind(group * self.stage.group_channels))
            first = T.Bind(tile * self.tiling.rows)
            with T.serial(tirx.truncdiv(count, PIXELS_TOGETHER)) as turn:
                self._pixels(image, first + turn * PIXELS_TOGETHER, PIXELS_TOGETHER)
            with T.serial(tirx.truncmod(count, PIXELS_TOGETHER)) as rest:
                self._pixels(image, first + (count - 1 - rest), 1)

    def emit_rows(self, batch: Index, first: Index, stop: Index) -> None:
        """Not to be had: every result depends on all pixels."""
        raise VerificationError("A group normalisation cannot be computed a few rows at a time")

    def _merge_tasks(self, image: Index) -> None:
        """Mean and squared distances of each channel of `image`, from what all tasks found of it."""
        pixels, rows = self.stage.pixels, self.tiling.rows
        last = pixels - (self.tiles - 1) * rows

        def merge(channel: Index, lanes: int, turn: int) -> None:
            mean, squares = Accumulator(lanes), Accumulator(lanes)
            for register in (mean, squares):
                register.set(constant(0, lanes))

            def for_each_task(body: Callable[[Index, Index, int], None]) -> None:
                if self.tiles > 1:
                    with T.serial(self.tiles - 1) as tile:
                        body(*self.found(image, tile), rows)
                body(*self.found(image, self.tiles - 1), last)

            def add_mean(means: Index, _: Index, count: int) -> None:
                own = self.partial[ramp(means + channel, lanes)]
                mean.set(mean.value + own * constant(count / pixels, lanes))

            def add_squares(means: Index, distances: Index, count: int) -> None:
                apart = _square(self.partial[ramp(means + channel, lanes)] - mean.value) * constant(count, lanes)
                squares.set(squares.value + (self.partial[ramp(distances + channel, lanes)] + apart))

            for_each_task(add_mean)
            if self.tiles == 1:
                squares.set(self.partial[ramp(self.found(image, 0)[1] + channel, lanes)])
            else:
                for_each_task(add_squares)
            self.merged.store((0, channel), mean.value)
            self.merged.store((1, channel), squares.value)

        for_each_vector(self.stage.channels, self.lanes, merge)

    def _scale_channels(self, channel: Index, lanes: int) -> None:
        """Replace the squared distances of channels that are groups of their own by their scale."""
        variance = self.merged.load((1, channel), lanes) * constant(1 / self.stage.pixels, lanes)
        self._store_scale(channel, inverse_root(variance, self.stage.epsilon), lanes)

    def _merge_channels(self, first: Index) -> None:
        """Replace means and squared distances of the channels of a group, from `first` on, by its mean and scale."""
        channels, pixels = self.stage.group_channels, self.stage.pixels

        def squares(channel: Index, lanes: int) -> Expr:
            apart = _square(self.merged.load((0, first + channel), lanes) - broadcast(mean, lanes))
            return self.merged.load((1, first + channel), lanes) + apart * constant(pixels, lanes)

        means = total(channels, self.lanes, lambda channel, lanes: self.merged.load((0, first + channel), lanes))
        mean = T.Bind(means * constant(1 / channels, 1))
        variance = total(channels, self.lanes, squares) * constant(1 / (channels * pixels), 1)
        scale = T.Bind(inverse_root(variance, self.stage.epsilon))

        def spread(channel: Index, lanes: int, turn: int) -> None:
            self.merged.store((0, first + channel), broadcast(mean, lanes))
            self._store_scale(first + channel, broadcast(scale, lanes), lanes)

        for_each_vector(channels, self.lanes, spread)

    def _store_scale(self, channel: Index, scale: Expr, lanes: int) -> None:
        if self.gain is not None:
            scale = scale * cast(self.gain[ramp(channel, lanes)], FLOAT32.name)
        self.merged.store((1, channel), scale)

    def _pixels(self, image: Index, first: Index, count: int) -> None:
        """Normalise `count` pixels from `first` on, by the merged means and scales."""
        positions = [self.pixel(image, first + number) for number in range(count)]

        def write(channel: Index, lanes: int, turn: int) -> None:
            mean, scale = (T.Bind(self.merged.load((which, channel), lanes)) for which in (0, 1))
            shift = T.Bind(cast(self.shift[ramp(channel, lanes)], FLOAT32.name)) if self.shift is not None else None
            for pixel in positions:
                y = (self.source.load_float32((*pixel, channel), lanes) - mean) * scale
                self.sink((*pixel, channel), y if shift is None else y + shift)

        for_each_vector(self.stage.channels, self.lanes, write)


def _square(value: Expr) -> Expr:
    bound = T.Bind(value)
    return bound * bound
