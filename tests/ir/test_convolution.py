"""Convolutions: column segments cover a row exactly once, and what is called interior is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.element import FLOAT16, FLOAT32, LONGEST_SUM

SETTINGS = settings(max_examples=500, deadline=None, derandomize=True)


@st.composite
def rows(draw: st.DrawFn) -> Convolution:
    """A convolution of one row: kernels may be larger than the map, padding larger than the kernel."""
    width, kernel, stride, dilation = (draw(st.integers(1, most)) for most in (40, 9, 4, 4))
    padding = draw(st.integers(0, 12))
    # With padding behind the row too, of another size: as where a pad joins.
    behind = draw(st.integers(0, 12))
    reach = width + padding + behind - dilation * (kernel - 1) - 1
    out = max(1, reach // stride + 1)
    return Convolution(1, 1, width, 1, out, 8, 8, 1, (1, kernel), (1, stride), (0, padding), (1, dilation))


@SETTINGS
@given(rows(), st.integers(1, 30))
def test_column_segments_cover_every_column_once_and_in_order(conv: Convolution, block: int) -> None:
    covered = [
        segment.start + index
        for segment in conv.column_segments(block)
        for index in range(segment.columns * segment.repeat)
    ]
    assert covered == list(range(conv.out_width))


@SETTINGS
@given(rows(), st.integers(1, 30))
def test_interior_segments_need_no_check(conv: Convolution, block: int) -> None:
    for segment in conv.column_segments(block):
        columns = range(segment.start, segment.start + segment.columns * segment.repeat)
        inside = all(conv.column_valid(column, tap) for column in columns for tap in range(conv.kernel[1]))
        assert inside or not segment.interior


@SETTINGS
@given(rows(), st.integers(1, 30))
def test_segments_are_no_wider_than_the_block_and_only_the_interior_repeats(conv: Convolution, block: int) -> None:
    segments = conv.column_segments(block)
    assert all(1 <= segment.columns <= block for segment in segments)
    assert all(segment.interior for segment in segments if segment.repeat > 1)
    assert sum(segment.repeat > 1 for segment in segments) <= 1


@SETTINGS
@given(rows(), st.integers(0, 60), st.integers(0, 8))
def test_a_column_is_valid_where_its_tap_is_inside(conv: Convolution, column: int, tap: int) -> None:
    position = column * conv.stride[1] - conv.padding[1] + tap * conv.dilation[1]
    assert conv.column_valid(column, tap) == (position in range(conv.in_width))


def test_most_of_a_usual_row_is_interior() -> None:
    conv = Convolution(1, 56, 56, 56, 56, 64, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1))
    assert [(one.start, one.columns, one.repeat, one.interior) for one in conv.column_segments(6)] == [
        (0, 6, 1, False),
        (6, 6, 8, True),
        (54, 2, 1, False),
    ]


@pytest.mark.parametrize(
    ("groups", "channels_in", "channels_out", "expected"),
    [
        (1, 16, 16, False),  # dense
        (16, 16, 16, True),  # depthwise
        (16, 16, 32, True),  # with a multiplier of two
        (16, 16, 48, False),  # groups of three do not fill vectors
        (2, 16, 16, False),  # groups as wide as a vector
        (4, 32, 16, True),  # narrow groups
        (2, 64, 64, False),  # wide groups
    ],
)
def test_a_vector_is_lanewise_where_it_spans_groups(
    groups: int, channels_in: int, channels_out: int, expected: bool
) -> None:
    assert Convolution(1, 5, 5, 5, 5, channels_in, channels_out, groups).lanewise(8) is expected


def test_numbers_of_a_convolution() -> None:
    conv = Convolution(2, 9, 9, 4, 4, 12, 6, 3, (3, 2), (2, 2))
    assert (conv.group_in, conv.group_out, conv.taps, conv.pixels) == (4, 2, 6, 32)
    assert conv.flops == 2 * 32 * 6 * 4 * 6


@pytest.mark.parametrize(
    ("product", "half"),
    [
        (Convolution(1, 1, 196, 1, 196, 384, 1536), Convolution(1, 1, 98, 1, 98, 192, 768)),
        (Convolution(1, 1, 49, 1, 49, 6, 10), Convolution(1, 1, 25, 1, 25, 3, 5)),
        (Convolution(1, 1, 1, 1, 1, 6, 10), None),
        (Convolution(1, 1, 49, 1, 49, 7, 10), None),
        (Convolution(1, 1, 49, 1, 49, 6, 9), None),
        (Convolution(1, 7, 7, 7, 7, 6, 10), None),
        (Convolution(2, 1, 49, 1, 49, 6, 10), None),
        (Convolution(1, 1, 49, 1, 25, 6, 10, stride=(1, 2)), None),
        (Convolution(1, 1, 49, 1, 49, 6, 10, kernel=(1, 3), padding=(0, 1)), None),
        (Convolution(1, 1, 49, 1, 49, 6, 10, groups=2), None),
    ],
)
def test_halves_of_matrix_products_and_of_nothing_else(product: Convolution, half: Convolution | None) -> None:
    assert product.halves == half


@SETTINGS
@given(st.integers(1, 2000), st.integers(1, 9), st.integers(1, 3))
def test_long_sums_of_float16_fall_into_blocks_that_cover_a_kernel_row_once(
    channels: int, taps: int, rows: int
) -> None:
    conv = Convolution(1, 9, 20, 1, 1, channels, 8, 1, (rows, taps), element=FLOAT16)
    assert conv.sums_in_blocks == (rows * taps * channels > LONGEST_SUM)
    covered = 0
    for columns, runs, run in conv.row_sums:
        assert columns * run <= LONGEST_SUM
        assert runs == ceil_div(channels, run)
        assert columns == 1 or runs == 1
        covered += columns
    assert covered == taps
    assert not conv.of(FLOAT32).sums_in_blocks
    assert conv.of(FLOAT32).row_sums == ((taps, 1, channels),)


def test_fast_algorithms_are_for_float32_only() -> None:
    product = Convolution(1, 1, 128, 1, 128, 64, 64)
    tiles = Convolution(1, 8, 8, 8, 8, 64, 64, 1, (3, 3), (1, 1), (1, 1))
    assert product.halves is not None
    assert tiles.winograd_product(2) is not None
    assert product.of(FLOAT16).halves is None
    assert tiles.of(FLOAT16).winograd_product(2) is None
