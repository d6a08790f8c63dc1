"""Bytes by footprint propagation against closed forms derived by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from sepc.cost_model.loops import run_bytes, set_share, streamed_footprint
from sepc.cost_model.tasks import task_counts
from sepc.cost_model.tiling import DenseTiling, LaneTiling, RowTiling
from sepc.cost_model.traffic import UNFORESEEN_STRIPS, nest_of
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.stage import Map, Normalization, Pooling

LANES = 16
POINTWISE = Convolution(1, 1, 120, 1, 120, 64, 96)
DEPTHWISE = Convolution(1, 32, 32, 32, 32, 48, 48, 48, (3, 3), (1, 1), (1, 1))


def test_what_fits_moves_nothing() -> None:
    nest = nest_of(POINTWISE, DenseTiling(12, (16, 16), 1, 10, 3), LANES, 1)
    assert nest.into_cache(1 << 30).total == 0


def test_pointwise_rereads_the_input_per_panel_or_the_weights_per_column_tile() -> None:
    # All panels in one task, columns tiled: weights (24576 bytes) are read again by each of the five column tiles.
    by_columns = nest_of(POINTWISE, DenseTiling(12, (16, 16), 1, 2, 3), LANES, 1)
    # Input and output of a tile; one panel of weights and the next, as the tile is swept between two uses of it.
    tile = 24 * (64 + 32) * 4 + 2 * 32 * 64 * 4
    fetched = by_columns.into_cache(tile)
    assert fetched.weights == 5 * 64 * 96 * 4
    assert fetched.activations == 120 * 64 * 4
    assert fetched.results == 120 * 96 * 4
    # All columns in one task: the input is read again by each of the three panels, where it does not fit.
    by_panels = nest_of(POINTWISE, DenseTiling(12, (16, 16), 1, 10, 3), LANES, 1)
    block = 12 * (64 + 32) * 4 + 32 * 64 * 4
    fetched = by_panels.into_cache(block)
    assert fetched.weights == 64 * 96 * 4
    assert fetched.activations == 3 * 120 * 64 * 4


def test_what_the_epilogue_reads_does_not_change_how_often_the_input_is_read() -> None:
    # Where one panel and the next do not fit beside the input, the input is read again by each panel, sum or not.
    tiling, capacity = DenseTiling(12, (16, 16), 1, 10, 3), 120 * (64 + 32) * 4 + 32 * 64 * 4
    plain = nest_of(POINTWISE, tiling, LANES, 1).into_cache(capacity)
    with_sum = nest_of(POINTWISE, tiling, LANES, 1, operand_bytes=120 * 96 * 4).into_cache(capacity + 120 * 32 * 4)
    assert plain.activations == with_sum.activations == 3 * 120 * 64 * 4
    assert (plain.operands, with_sum.operands) == (0, 120 * 96 * 4)
    assert with_sum.results == plain.results


def test_depthwise_rereads_the_halo_per_row_tile() -> None:
    nest = nest_of(DEPTHWISE, LaneTiling(8, 1, 8, 3), LANES, 1)
    strip = (10 * 32 + 8 * 32) * 16 * 4 + 9 * 16 * 4  # input and output of one channel group of a task
    in_rows = 4 * 10  # four row tiles with two rows of halo each
    assert nest.into_cache(strip, first_level=True).activations <= in_rows * 32 * 48 * 4
    whole_task = (10 * 32 + 8 * 32) * 48 * 4 + 9 * 48 * 4
    assert nest.into_cache(whole_task).activations == pytest.approx(32 * 32 * 48 * 4)


def test_weights_that_every_task_uses_outlast_the_call() -> None:
    tiling = DenseTiling(12, (16, 16), 1, 2, 3)
    whole = 4 * (120 * (64 + 96) + 64 * 96)
    fetched = nest_of(POINTWISE, tiling, LANES, 1).into_cache(0.8 * whole)
    assert fetched.weights == 0
    assert fetched.activations == 120 * 64 * 4
    assert fetched.results == pytest.approx(120 * 96 * 4)


def test_the_columns_of_all_tasks_are_the_whole_row() -> None:
    conv = Convolution(1, 112, 112, 56, 56, 3, 32, 1, (7, 7), (2, 2), (3, 3))  # two blocks of the row are borders
    nest = nest_of(conv, DenseTiling(4, (16, 16), 1, 6, 1), LANES, 1)
    assert nest.footprints[0].results == 56 * 56 * 32 * 4


def test_strips_are_told_apart() -> None:
    nest = nest_of(DEPTHWISE, LaneTiling(8, 1, 32, 3), LANES, 1)
    strip = 2 * 32 * 32 * 16 * 4 + 9 * 16 * 4
    fetched = nest.into_cache(strip)
    assert fetched.read_strips == fetched.activations > 0
    assert fetched.written_strips == fetched.results > 0
    assert nest_of(DEPTHWISE, LaneTiling(8, 3, 32, 1), LANES, 1).into_cache(strip).read_strips == 0


@pytest.mark.parametrize("channels", [1, 8, 16, 24, 40, 48, 95, 96])
@pytest.mark.parametrize("pixel_channels", [3, 16, 24, 96, 100])
def test_run_bytes_against_counting_lines(channels: int, pixel_channels: int) -> None:
    if pixel_channels % channels:
        return  # what is left over at a pixel's end is shorter
    starts = [
        4 * (pixel * pixel_channels + k * channels) for pixel in range(16) for k in range(pixel_channels // channels)
    ]
    lines = [(start + 4 * channels - 1) // 64 - start // 64 + 1 for start in starts]
    expected = 64 * sum(lines) / len(lines)
    assert run_bytes(channels, pixel_channels) == min(expected, 4 * pixel_channels)


def test_overflow_is_gradual_and_traffic_never_grows_with_the_cache() -> None:
    nest = nest_of(DEPTHWISE, LaneTiling(8, 1, 8, 3), LANES, 1)
    totals = [nest.into_cache(capacity, first_level=True).total for capacity in range(1000, 500_000, 1000)]
    assert all(smaller <= larger * (1 + 1e-9) for larger, smaller in itertools.pairwise(totals))
    assert totals[-1] == 0


def test_a_power_of_two_stride_uses_few_sets() -> None:
    assert set_share(16, 128) == 64 / 512
    assert set_share(16, 144) == 1.0
    assert set_share(128, 128) == 1.0
    assert set_share(1, 1) == 1.0


def test_threads_share_the_tasks() -> None:
    tiling = DenseTiling(12, (16, 16), 1, 2, 3)
    assert math.prod(task_counts(POINTWISE, tiling, LANES)) == 5
    assert nest_of(POINTWISE, tiling, LANES, 1).share == 1
    assert nest_of(POINTWISE, tiling, LANES, 2).share == 3 / 5
    assert nest_of(POINTWISE, tiling, LANES, 9).share == 1 / 5


def test_compulsory_bytes() -> None:
    footprint = streamed_footprint(POINTWISE)
    assert footprint.activations == 120 * 64 * 4
    assert footprint.weights == (64 * 96 + 96) * 4
    assert footprint.results == 120 * 96 * 4
    strided = Convolution(1, 8, 8, 4, 4, 16, 16, 1, (1, 1), (2, 2))
    assert streamed_footprint(strided).activations == 4 * 4 * 16 * 4  # the pixels between are not read
    assert streamed_footprint(Map((3, 5, 7))).total == 2 * 3 * 5 * 7 * 4
    assert streamed_footprint(Map((3, 5, 7)), operand_bytes=11).total == 3 * 5 * 7 * 4 + 11
    assert streamed_footprint(Normalization((1, 1, 10, 32), 1e-6)).total == 2 * 10 * 32 * 4 + 2 * 32 * 4
    assert streamed_footprint(Pooling(1, 7, 7, 1, 1, 64, False, True)).total == 50 * 64 * 4


def test_wrong_pairs_are_refused() -> None:
    with pytest.raises(TypeError, match="Convolution cannot be tiled by RowTiling"):
        task_counts(POINTWISE, RowTiling(1), LANES)


def test_strips_count_in_part_where_pixels_stay_until_whole_and_fully_where_they_do_not() -> None:
    tiling = LaneTiling(8, 1, DEPTHWISE.out_height, ceil_div(DEPTHWISE.out_channels, LANES))
    nest = nest_of(DEPTHWISE, tiling, LANES, 1)
    assert nest.footprints[-1].read_strips > 0
    everything = nest.footprints[0].total
    held, lost = nest.into_cache(0.99 * everything), nest.into_cache(0.2 * everything)
    assert held.read_strips == pytest.approx(UNFORESEEN_STRIPS * held.activations)
    assert lost.read_strips == lost.activations
    dense = nest_of(POINTWISE, DenseTiling(4, (LANES,), 1, 1000, 1000), LANES, 1).into_cache(1e5)
    assert dense.read_strips == 0
