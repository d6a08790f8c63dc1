"""What machines do at the most."""

from __future__ import annotations

import pytest

from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.machine import Machine
from sepc.cost_model.roofline import Roofline
from sepc.ir.element import FLOAT16


def test_the_peak_is_that_of_all_multiply_adds_of_all_threads() -> None:
    machine = Machine.load("cortex-a72")
    one = Roofline.of(machine)
    assert one.peak_gflops == pytest.approx(2 * 4 * machine.fma_per_cycle * machine.clock_ghz)
    assert Roofline.of(machine, threads=2).peak_gflops == pytest.approx(2 * one.peak_gflops)
    assert Roofline.of(machine, element=FLOAT16).peak_gflops == pytest.approx(2 * one.peak_gflops)
    assert one.compute_us(one.peak_gflops * 1e9) == pytest.approx(1e6)


def test_levels_behind_the_first_have_bandwidths_and_waterlines() -> None:
    machine = Machine.load("cortex-a72")
    roofline = Roofline.of(machine)
    assert list(roofline.bandwidth_gb_per_s) == [level.name for level in machine.levels[1:]] == ["L2", "DRAM"]
    dram = machine.levels[-1].bandwidth_bytes_per_cycle * machine.clock_ghz
    assert roofline.waterline("DRAM") == pytest.approx(roofline.peak_gflops / dram)
    assert roofline.bytes_us("DRAM", dram * 1e9) == pytest.approx(1e6)


def test_the_slowest_level_is_that_whose_bytes_take_the_longest() -> None:
    roofline = Roofline(100.0, {"L2": 50.0, "DRAM": 10.0})
    assert roofline.slowest_level({"L2": 1000.0, "DRAM": 300.0}) == "DRAM"
    assert roofline.slowest_level({"L2": 1000.0, "DRAM": 100.0}) == "L2"
    assert not roofline.slowest_level({"L2": 0.0})


def test_a_gpu_is_used_as_a_whole() -> None:
    machine = GpuMachine.load("sm_90")
    roofline = Roofline.of(machine, threads=7)
    lanes = machine.multiprocessors * machine.fp32_lanes
    assert roofline.peak_gflops == pytest.approx(2 * lanes * machine.clock_ghz)
    assert roofline.bandwidth_gb_per_s["DRAM"] == machine.dram_gb_per_s
