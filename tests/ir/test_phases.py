"""The phases of transposed convolutions against their definition, by counting what is multiplied with what."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sepc.ir.convolution import Convolution
from sepc.ir.phases import Axis, Interleaved, axis_phases, interleave


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    inputs, kernel = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    stride, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    whole = (inputs - 1) * stride + (kernel - 1) * dilation + 1 + draw(st.integers(0, max(stride, dilation) - 1))
    padding = draw(st.integers(0, (whole - 1) // 2))
    return Axis(inputs, whole - 2 * padding, kernel, stride, padding, dilation)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(axis=axes())
def test_every_product_of_the_definition_is_in_one_phase_and_no_other_product(axis: Axis) -> None:
    defined = {
        (i * axis.stride + tap * axis.dilation - axis.padding, i, tap)
        for i in range(axis.inputs)
        for tap in range(axis.kernel)
    }
    found = [
        (phase.first + m * axis.stride, i, tap)
        for phase in axis_phases(axis)
        for m in range(phase.outputs)
        for place, tap in enumerate(phase.taps)
        if 0 <= (i := m - phase.padding + place * phase.dilation) < axis.inputs
    ]
    assert len(found) == len(set(found))
    assert set(found) == {one for one in defined if 0 <= one[0] < axis.outputs}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(axis=axes())
def test_phases_cover_every_result_once(axis: Axis) -> None:
    results = [phase.first + m * axis.stride for phase in axis_phases(axis) for m in range(phase.outputs)]
    assert sorted(results) == list(range(axis.outputs))


def evaluate(stage: Interleaved, x: torch.Tensor, weight: np.ndarray) -> torch.Tensor:
    """What the phases compute, by PyTorch: each by a convolution after padding or cropping, written to its places."""
    result = torch.zeros(stage.extents[0], stage.extents[-1], *stage.extents[1:-1])
    for phase in stage.phases:
        conv = phase.convolution
        if not phase.taps:
            continue
        amounts = []
        for axis in (1, 0):
            reach = (conv.kernel[axis] - 1) * conv.dilation[axis]
            outputs, inputs = ((conv.out_height, conv.in_height), (conv.out_width, conv.in_width))[axis]
            amounts += [conv.padding[axis], outputs + reach - inputs - conv.padding[axis]]
        padded = functional.pad(x, amounts)
        own = functional.conv2d(padded, torch.from_numpy(phase.weight(weight)), None, 1, 0, conv.dilation, conv.groups)
        (row, column), (down, across) = phase.first, stage.step
        result[:, :, row::down, column::across] = own
    return result


@pytest.mark.parametrize(
    ("groups", "kernel", "stride", "padding", "output_padding", "dilation"),
    [
        (1, (2, 2), (2, 2), (0, 0), (0, 0), (1, 1)),
        (2, (4, 3), (2, 2), (1, 1), (0, 1), (1, 1)),
        (1, (3, 3), (3, 2), (0, 2), (2, 0), (1, 2)),
        (4, (5, 2), (2, 3), (4, 0), (1, 2), (2, 3)),
        (2, (1, 2), (3, 1), (0, 0), (0, 0), (1, 2)),
    ],
)
def test_interleaved_convolutions_are_the_transposed_one(
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    x, weight = torch.randn(2, 8, 5, 4), torch.randn(8, 3, *kernel)
    expected = functional.conv_transpose2d(x, weight, None, stride, padding, output_padding, groups, dilation)
    options = zip(x.shape[2:], expected.shape[2:], kernel, stride, padding, dilation, strict=True)
    stage = interleave(2, 8, 3 * groups, groups, [Axis(*option) for option in options])
    torch.testing.assert_close(evaluate(stage, x, weight.numpy()), expected, rtol=1e-4, atol=1e-4)


def test_no_overlap_gives_pointwise_phases() -> None:
    stage = interleave(1, 8, 4, 1, [Axis(5, 10, 2, 2, 0, 1), Axis(6, 12, 2, 2, 0, 1)])
    assert len(stage.phases) == 4
    assert {phase.convolution for phase in stage.phases} == {Convolution(1, 5, 6, 5, 6, 8, 4)}
    assert [phase.first for phase in stage.phases] == list(itertools.product((0, 1), repeat=2))
    assert stage.flops == 2 * 10 * 12 * 8 * 4


def test_a_phase_without_taps_is_counted_as_no_work_and_has_its_row_of_taps_outside() -> None:
    stage = interleave(1, 2, 2, 1, [Axis(3, 7, 1, 3, 0, 1)])
    bare = [phase for phase in stage.phases if not phase.taps]
    assert [phase.first for phase in bare] == [(0, 1), (0, 2)]
    assert all(phase.convolution.padding[0] >= phase.convolution.out_height for phase in bare)
    assert stage.flops == 2 * 3 * 2 * 2


def test_planes_rows_and_columns_have_phases_each() -> None:
    stage = interleave(1, 2, 2, 1, [Axis(2, 4, 2, 2, 0, 1), Axis(3, 9, 3, 3, 0, 1), Axis(4, 4, 1, 1, 0, 1)])
    assert len(stage.phases) == math.prod(stage.step) == 6
    assert stage.extents == (1, 4, 9, 4, 2)
    assert stage.position(stage.phases[-1], (0, 1, 2, 3, 1)) == (0, 3, 8, 3, 1)
