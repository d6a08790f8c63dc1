"""The links of a chain as a block computes them: items of pixels × channel vectors, in a thread's registers.

    dense:      out[y, x, o] = bias[o] + Σ_{i, r, c} in[y·s − p + r·d, x·s − p + c·d, i] · W[r, c, i, o]
    depthwise:  out[y, x, o] = bias[o] + Σ_{r, c} in[y·s − p + r·d, x·s − p + c·d, o] · W[r, c, o]

A dense item reads 4 input channels of each of its pixels at a time, and for each of these one vector of weights per
vector of results. A depthwise item reads an input vector once per kernel row, for every tap that needs it. Weights are
packed as [row tap][column tap][input channel][output channel], the output channels padded to whole tiles. Sums and
products are of float32, whatever is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.gpu.boxes import Channels, Item
from sepc.backends.gpu.memory import Source
from sepc.backends.stages.kernel import loop
from sepc.backends.stages.vector import Accumulator, Expr, FloatArray, Index, cast, constant, ramp
from sepc.cost_model.gpu_machine import VECTOR
from sepc.cost_model.gpu_tiling import GpuLink, is_dense, vector_groups
from sepc.cost_model.tiling import unrolled_taps
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.element import FLOAT32

Finish = Callable[[int, int, int, Expr], None]
"""Takes lanes of a finished vector: its pixel and vector number, the first lane, and the value of the lanes."""


def padded_channels(channels: int, size: int, link: GpuLink) -> int:
    """Channels that the items of all runs of `size` output channels have, the last ones included."""
    covered = vector_groups(size, link) * link.vectors * VECTOR
    return (ceil_div(channels, size) - 1) * size + covered


def pack_weights(weight: FloatArray, channels: int) -> FloatArray:
    """`weight` [O, I/groups, KH, KW] as the flat array that kernels read, with the output channels padded."""
    outputs, inputs, rows, columns = weight.shape
    packed = np.zeros((rows, columns, inputs, channels), weight.dtype)
    packed[..., :outputs] = weight.transpose(2, 3, 1, 0)
    return packed.ravel()


def pack_bias(bias: FloatArray, channels: int) -> FloatArray:
    """`bias` padded in the same way."""
    return np.pad(bias, (0, channels - bias.size))


@dataclass(frozen=True)
class Constants:
    """A layer's packed weights and bias.

    Attributes:
        weight: flat buffer. bias: flat buffer, or None. channels: output channels with padding.
    """

    weight: Expr
    bias: Expr | None
    channels: int

    def weights(self, row: Index, first: Index) -> Expr:
        """The vector of output channels from `first` on in row number `row`: that of a tap and an input channel."""
        return _float32(self.weight[ramp(row * self.channels + first, VECTOR)])


@dataclass(frozen=True)
class Sums:
    """The registers of an item: a vector of sums for each pixel and channel vector."""

    link: GpuLink
    accumulators: Sequence[Sequence[Accumulator]]

    @staticmethod
    def of(link: GpuLink) -> Sums:
        """New ones."""
        return Sums(link, [[Accumulator(VECTOR) for _ in range(link.vectors)] for _ in range(link.pixels)])

    def start(self, item: Item, channels: Channels, constants: Constants) -> None:
        """Begin with the bias, or with 0."""
        for vector in range(self.link.vectors):
            initial = constant(0, VECTOR)
            if constants.bias is not None:
                initial = _float32(constants.bias[ramp(channels.first + item.channel(vector), VECTOR)])
            for of_pixel in self.accumulators:
                of_pixel[vector].set(initial)

    def add(self, pixel: int, vector: int, product: Expr) -> None:
        """Add a vector of products."""
        accumulator = self.accumulators[pixel][vector]
        accumulator.set(accumulator.value + product)

    def finish(self, item: Item, channels: Channels, finish: Finish) -> None:
        """Hand over what there is of the vectors."""
        for vector in range(self.link.vectors):

            def piece(offset: int, lanes: int, vector: int = vector) -> None:
                for pixel, of_pixel in enumerate(self.accumulators):
                    finish(pixel, vector, offset, _part(of_pixel[vector].value, offset, lanes))

            channels.for_each_piece(item.channel(vector), item.covered, piece)


def _float32(value: Expr) -> Expr:
    """`value` in registers, in the type in which products are added up."""
    return T.Bind(cast(value, FLOAT32.name))


def _part(value: Expr, offset: int, lanes: int) -> Expr:
    """`lanes` lanes of a vector from lane `offset` on."""
    if lanes == VECTOR:
        return value
    return tirx.Shuffle([value], [tirx.const(offset + lane, "int32") for lane in range(lanes)])


@dataclass(frozen=True)
class LinkEmitter:
    """Emits what a link computes.

    Attributes:
        conv: the layer. link: its register block. constants: its weights and bias.
        source: what it reads.
    """

    conv: Convolution
    link: GpuLink
    constants: Constants
    source: Source

    def add(self, sums: Sums, item: Item, channels: Channels, inputs: Channels) -> None:
        """Add the products of the input channels `inputs`, of a dense layer, or of a depthwise one's own."""
        if is_dense(self.conv):
            self._add_dense(sums, item, channels, inputs)
        else:
            self._add_depthwise(sums, item, channels)

    def _add_dense(self, sums: Sums, item: Item, channels: Channels, inputs: Channels) -> None:
        conv = self.conv
        with loop(conv.kernel[0]) as row, loop(conv.kernel[1]) as column:
            tap = (row * conv.kernel[1] + column) * conv.in_channels + inputs.first
            place = (row * conv.dilation[0], column * conv.dilation[1])
            count = inputs.count
            if count >= VECTOR:
                with loop(count // VECTOR) as turn:
                    self._add_channels(sums, item, channels, place, tap, turn * VECTOR, VECTOR)
            for rest in range(count // VECTOR * VECTOR, count):
                self._add_channels(sums, item, channels, place, tap, rest, 1)

    def _add_channels(
        self,
        sums: Sums,
        item: Item,
        channels: Channels,
        place: tuple[Index, Index],
        tap: Index,
        first: Index,
        count: int,
    ) -> None:
        """Add the products of `count` input channels from `first` on of the turn, at one tap."""
        row, column = place
        values = [
            _float32(self.source.load(item, row, column + pixel * self.conv.stride[1], first, count))
            for pixel in range(self.link.pixels)
        ]
        for channel in range(count):
            for vector in range(self.link.vectors):
                weights = self.constants.weights(tap + first + channel, channels.first + item.channel(vector))
                for pixel, value in enumerate(values):
                    scalar = tirx.Shuffle([value], [tirx.const(channel, "int32")]) if count > 1 else value
                    sums.add(pixel, vector, tirx.Broadcast(scalar, VECTOR) * weights)

    def _add_depthwise(self, sums: Sums, item: Item, channels: Channels) -> None:
        conv, taps = self.conv, self.conv.kernel[1]
        size = unrolled_taps(taps)
        with loop(conv.kernel[0]) as row:
            with loop(taps // size) as part:
                self._add_taps(sums, item, channels, row, part * size, size)
            if taps % size:
                self._add_taps(sums, item, channels, row, taps // size * size, taps % size)

    def _add_taps(self, sums: Sums, item: Item, channels: Channels, row: Index, first: Index, count: int) -> None:
        """Add the products of `count` taps of a kernel row from `first` on."""
        conv = self.conv
        for vector in range(self.link.vectors):
            channel = item.channel(vector)
            weights = [
                self.constants.weights(row * conv.kernel[1] + first + tap, channels.first + channel)
                for tap in range(count)
            ]
            users: dict[int, list[tuple[int, int]]] = {}
            for pixel in range(self.link.pixels):
                for tap in range(count):
                    users.setdefault(pixel * conv.stride[1] + tap * conv.dilation[1], []).append((pixel, tap))
            for column in sorted(users):
                across = first * conv.dilation[1] + column
                value = _float32(self._load(item, row * conv.dilation[0], across, channel, channels))
                for pixel, tap in users[column]:
                    sums.add(pixel, vector, value * weights[tap])

    def _load(self, item: Item, row: Index, column: Index, channel: Index, channels: Channels) -> Expr:
        """A vector of input channels; past the last one, that again."""
        if channels.tail:
            places = [tirx.min(channel + lane, channels.limit - 1) for lane in range(VECTOR)]
            parts = [self.source.load(item, row, column, place, 1) for place in places]
            return tirx.Shuffle([tirx.Broadcast(part, 2) for part in parts], [2 * lane for lane in range(VECTOR)])
        if not isinstance(channels.limit, int) or item.covered != channels.limit:
            channel = tirx.min(channel, channels.limit - VECTOR)
        return self.source.load(item, row, column, channel, VECTOR)
