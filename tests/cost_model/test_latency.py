"""Predicted times: arithmetic against bytes, on one thread and on several, for every kind of stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sepc.cost_model.latency import predict
from sepc.cost_model.machine import Machine
from sepc.cost_model.tiling import DenseTiling, LaneTiling, RowTiling
from sepc.ir.convolution import Convolution
from sepc.ir.depth import Depth
from sepc.ir.stage import Map, Normalization, Pooling

ZEN5 = Machine.load("znver5")


def _pointwise(pixels: int, inputs: int, outputs: int) -> Convolution:
    return Convolution(1, 1, pixels, 1, pixels, inputs, outputs)


def test_two_threads_take_half_where_the_tasks_are_even() -> None:
    conv, tiling = _pointwise(3136, 128, 128), DenseTiling(14, (16, 16), 1, 14, 4)
    one, two = (predict(conv, tiling, ZEN5, threads).time_us for threads in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.05)
    single_task = DenseTiling(14, (16, 16), 1, 224, 4)
    assert predict(conv, single_task, ZEN5, 2).time_us >= 0.95 * predict(conv, single_task, ZEN5, 1).time_us


def test_large_maps_are_bound_by_memory() -> None:
    cost = predict(Map((64, 1024, 1024)), RowTiling(16), ZEN5, 1)
    assert cost.bottleneck == "DRAM"
    assert cost.bytes_moved == 2 * 64 * 1024 * 1024 * 4
    assert dict(cost.bytes_per_level)["DRAM"] == cost.bytes_moved


def test_depthwise_tasks_whose_pixels_stay_in_the_second_level_are_quicker() -> None:
    # Measured on Zen 5: 44 us with 14 rows per task, 65 us with 56.
    conv = Convolution(1, 56, 56, 56, 56, 144, 144, 144, (3, 3), (1, 1), (1, 1))
    short, tall = (predict(conv, LaneTiling(7, 1, rows, 9), ZEN5, 1).time_us for rows in (14, 56))
    assert tall > 1.1 * short


@pytest.mark.parametrize("name", Machine.known())
def test_every_kind_of_stage_has_a_time_on_every_machine(name: str) -> None:
    machine = Machine.load(name)
    lanes = machine.vector_lanes
    depthwise = Convolution(1, 9, 9, 9, 9, 21, 21, 21, (3, 3), (1, 1), (1, 1))
    costs = [
        predict(_pointwise(9, 3, 5), DenseTiling(2, (4, 1), 1, 2, 1), machine, 1),
        predict(depthwise, LaneTiling(4, 1, 3, 1), machine, 3),
        predict(replace(depthwise, depth=Depth(5, 5, 3, 1, 1)), LaneTiling(4, 1, 3, 1), machine, 3),
        predict(Pooling(1, 9, 9, 4, 4, 2 * lanes, True, False, (3, 3), (2, 2)), LaneTiling(1, 2, 4, 1), machine, 1),
        predict(Normalization((1, 1, 10, 37), 1e-6), RowTiling(3), machine, 2),
        predict(Map((10, 37)), RowTiling(3), machine, 2, operand_bytes=40),
    ]
    assert all(cost.time_us >= cost.compute_us > 0 and cost.bytes_moved > 0 for cost in costs)
