"""Predicted times and tilings of group normalisations."""

from __future__ import annotations

import math

import pytest

from sepc.cost_model.group_normalization import choose_group_normalization, predict_group_normalization
from sepc.cost_model.machine import Machine
from sepc.cost_model.tiling import RowTiling
from sepc.ir.group_normalization import GroupNormalization

ZEN5 = Machine.load("znver5")

# Images, channels, pixels, groups, and microseconds on one and two threads of a Zen 5 host (least of 40).
MEASURED = [
    (1, 256, 784, 32, 23.1, 12.0),
    (1, 96, 3136, 1, 38.5, 17.4),
    (1, 64, 12544, 32, 104.1, 55.4),
    (1, 64, 3136, 64, 24.1, 11.8),
    (1, 512, 196, 32, 10.3, 6.1),
    (1, 32, 3136, 8, 10.1, 4.9),
    (1, 384, 196, 1, 8.4, 5.1),
    (1, 2048, 49, 32, 12.9, 8.1),
]


@pytest.mark.parametrize(("images", "channels", "pixels", "groups", "one_us", "two_us"), MEASURED)
def test_predictions_are_near_what_was_measured(
    images: int, channels: int, pixels: int, groups: int, one_us: float, two_us: float
) -> None:
    stage = GroupNormalization((images, pixels, channels), groups, 1e-5)
    for threads, measured_us in ((1, one_us), (2, two_us)):
        predicted_us = choose_group_normalization(stage, ZEN5, threads).cost.time_us
        assert measured_us / 1.5 < predicted_us < measured_us * 1.5


@pytest.mark.parametrize("name", Machine.known())
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_size_gets_a_tiling_that_loads_threads_evenly(name: str, threads: int) -> None:
    machine = Machine.load(name)
    for images, pixels, channels in ((1, 784, 256), (1, 1, 8), (8, 49, 2048), (3, 17, 1)):
        choice = choose_group_normalization(GroupNormalization((images, pixels, channels), 1, 1e-5), machine, threads)
        assert isinstance(choice.tiling, RowTiling)
        assert 1 <= choice.tiling.rows <= pixels
        assert math.isfinite(choice.cost.time_us)
        if pixels > 100:
            assert images * math.ceil(pixels / choice.tiling.rows) % threads == 0


def test_many_tasks_cost_more_to_merge() -> None:
    stage = GroupNormalization((1, 784, 256), 32, 1e-5)
    few, many = (predict_group_normalization(stage, RowTiling(rows), ZEN5, 1).time_us for rows in (784, 8))
    assert few < many


def test_an_epilogue_and_its_operands_cost_time() -> None:
    stage = GroupNormalization((1, 3136, 96), 1, 1e-5)
    plain = choose_group_normalization(stage, ZEN5, 1).cost.time_us
    assert choose_group_normalization(stage, ZEN5, 1, epilogue_cost=20).cost.time_us > plain
    assert choose_group_normalization(stage, ZEN5, 1, operand_bytes=3136 * 96 * 4).cost.time_us > plain


def test_a_stage_without_work_has_no_tiling() -> None:
    with pytest.raises(ValueError, match="computes nothing"):
        choose_group_normalization(GroupNormalization((0, 49, 8), 1, 1e-5), ZEN5, 1)
