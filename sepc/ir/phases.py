"""Transposed convolutions as interleaved convolutions of stride 1: the phases of the kernel.

Pattern. In one dimension, with stride s, dilation d and padding p,

    y[o] = Σ over i, t with o = i·s + t·d - p of x[i]·W[t]

Theorem. Let g = gcd(s, d). The results o = s·m + r of phase r (0 ≤ r < s) read x[i] through the taps t with
t·d ≡ r + p (mod s). These are none, or t₀, t₀ + s/g, t₀ + 2·s/g, … = t₀ … t_J, of which t_j reads

    i = m + c - j·d/g,    c = (r + p - t₀·d) / s

so that phase r is the convolution of stride 1, dilation d/g and padding J·d/g - c with the taps t_J … t₀, in this
order. Nothing is multiplied that does not count. Several dimensions split one by one, so that n of them have
s₁ · … · sₙ phases; groups and output_padding change nothing, as the latter only says how many results there are. A
padding below zero leaves out the first rows, and where a phase has no taps, results are the bias: its only row of taps
is outside.

Preconditions. None: any stride, padding, output padding, dilation and groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.depth import Depth
from sepc.ir.element import Element

MOST_PHASES: Final = 64
"""The code of a kernel grows with its phases; those of more (a stride of 9 in two dimensions) are left to PyTorch."""


class Axis(NamedTuple):
    """One dimension of a transposed convolution."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int


class AxisPhase(NamedTuple):
    """One phase along one dimension: a convolution of stride 1 from the result `first` on, with `taps` in its order."""

    first: int
    outputs: int
    taps: tuple[int, ...]
    padding: int
    dilation: int


@dataclass(frozen=True)
class Phase:
    """A convolution of stride 1 that computes every s-th result along each dimension, from `first` on.

    Attributes:
        convolution: its shape.
        first: the (plane,) row and column of its first result.
        taps: for each spatial dimension of the weights, which it takes; none at all where there are none along one.
    """

    convolution: Convolution
    first: tuple[int, ...]
    taps: tuple[tuple[int, ...], ...]

    def weight(self, transposed: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Its weights [O, I/groups, KH, KW] out of those of the transposed convolution, [I, O/groups, kernel…]."""
        conv = self.convolution
        if not self.taps:
            return np.zeros((conv.out_channels, conv.group_in, 1, 1), transposed.dtype)
        grouped = transposed.reshape(conv.groups, conv.group_in, conv.group_out, *transposed.shape[2:])
        for axis, taps in enumerate(self.taps, start=3):
            grouped = grouped.take(taps, axis)
        own = grouped.swapaxes(1, 2)
        return own.reshape(conv.out_channels, conv.group_in, conv.kernel_rows, conv.kernel[1])


@dataclass(frozen=True)
class Interleaved:
    """A transposed convolution: `phases` whose results interleave, every `step`-th being of the same one.

    `extents` are those of the result, (batch, (plane,) row, column, channel); `step` is of (plane,) row and column.
    """

    extents: tuple[int, ...]
    step: tuple[int, ...]
    phases: tuple[Phase, ...]

    @property
    def element(self) -> Element:
        """The type of the numbers."""
        return self.phases[0].convolution.element

    def of(self, element: Element) -> Interleaved:
        """The same of numbers of another type."""
        phases = (replace(one, convolution=one.convolution.of(element)) for one in self.phases)
        return replace(self, phases=tuple(phases))

    @property
    def flops(self) -> int:
        """Floating-point operations of all phases that have taps."""
        return sum(phase.convolution.flops for phase in self.phases if phase.taps)

    def position(self, phase: Phase, own: Sequence[int]) -> tuple[int, ...]:
        """Where the result of `phase` at `own` lies in the whole; positions may be expressions."""
        batch, *pixel, channel = own
        placed = (place * step + first for place, step, first in zip(pixel, self.step, phase.first, strict=True))
        return (batch, *placed, channel)


def axis_phases(axis: Axis) -> list[AxisPhase]:
    """The phases along one dimension that have any results."""
    phases = []
    shared = math.gcd(axis.stride, axis.dilation)
    for first in range(min(axis.stride, axis.outputs)):
        outputs = ceil_div(axis.outputs - first, axis.stride)
        reach = first + axis.padding
        taps = [tap for tap in range(axis.kernel) if (reach - tap * axis.dilation) % axis.stride == 0]
        dilation, padding = axis.dilation // shared, 0
        if taps:
            offset = (reach - taps[0] * axis.dilation) // axis.stride
            padding = (len(taps) - 1) * dilation - offset
        phases.append(AxisPhase(first, outputs, tuple(reversed(taps)), padding, dilation))
    return phases


def interleave(batch: int, in_channels: int, out_channels: int, groups: int, axes: Sequence[Axis]) -> Interleaved:
    """The transposed convolution along `axes`: columns, rows and columns, or planes, rows and columns."""
    rows = () if len(axes) > 1 else (Axis(1, 1, 1, 1, 0, 1),)
    spatial = (*rows, *axes)
    phases = []
    for parts in itertools.product(*map(axis_phases, spatial)):
        conv = _convolution(batch, in_channels, out_channels, groups, spatial, parts)
        taps = tuple(part.taps for part in parts[len(rows) :]) if all(part.taps for part in parts) else ()
        phases.append(Phase(conv, tuple(part.first for part in parts), taps))
    extents = (batch, *(axis.outputs for axis in spatial), out_channels)
    return Interleaved(extents, tuple(axis.stride for axis in spatial), tuple(phases))


def _convolution(
    batch: int, inputs: int, outputs: int, groups: int, axes: Sequence[Axis], parts: Sequence[AxisPhase]
) -> Convolution:
    """The convolution of the phase `parts`."""
    (*outer, row, column), (*outer_axes, row_axis, column_axis) = parts, axes
    if not all(part.taps for part in parts):
        # No row of the kernel is inside, and the width, which then does not matter, is one that takes no borders.
        depth = Depth(outer_axes[0].inputs, outer[0].outputs) if outer else None
        pixels = (row_axis.inputs, column.outputs, row.outputs, column.outputs)
        return Convolution(batch, *pixels, inputs, outputs, groups, padding=(row.outputs, 0), depth=depth)
    depth = None
    if outer:
        (plane,), (axis,) = outer, outer_axes
        depth = Depth(axis.inputs, plane.outputs, len(plane.taps), 1, plane.padding, plane.dilation)
    return Convolution(
        batch,
        row_axis.inputs,
        column_axis.inputs,
        row.outputs,
        column.outputs,
        inputs,
        outputs,
        groups,
        kernel=(len(row.taps), len(column.taps)),
        padding=(row.padding, column.padding),
        dilation=(row.dilation, column.dilation),
        depth=depth,
    )
