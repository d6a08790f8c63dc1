"""What the arithmetic of register blocks costs on full-width and on half-width machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sepc.cost_model import search
from sepc.cost_model.blocks import tap_uses
from sepc.cost_model.cycles import compute_cycles
from sepc.cost_model.machine import Machine
from sepc.cost_model.tiling import DenseTiling, LaneTiling, RegisterBlock
from sepc.ir.convolution import Convolution
from sepc.ir.depth import Depth
from sepc.target import Target

ZEN5 = Machine.load("znver5")
ZEN4 = Machine.load("znver4")


def _pointwise(pixels: int, inputs: int, outputs: int) -> Convolution:
    return Convolution(1, 1, pixels, 1, pixels, inputs, outputs)


def _dense(conv: Convolution, columns: int, panel: tuple[int, ...], machine: Machine = ZEN5) -> float:
    return compute_cycles(conv, DenseTiling(columns, panel, 1, 1000, 1000), machine)


def test_large_blocks_run_near_the_peak() -> None:
    conv = _pointwise(3136, 128, 128)
    for columns, panel in ((14, (16, 16)), (7, (16, 16, 16))):
        peak = conv.flops / ZEN5.flops_per_cycle
        assert peak <= _dense(conv, columns, panel) < 1.1 * peak


def test_few_accumulators_wait_for_the_latency() -> None:
    conv = _pointwise(1, 1024, 64)
    assert _dense(conv, 1, (16,)) >= 4 * 1024 * ZEN5.fma_latency_cycles
    assert _dense(conv, 1, (16,) * 4) < 0.3 * _dense(conv, 1, (16,))


def test_small_blocks_wait_for_the_instructions_to_enter() -> None:
    # LLVM's model of a Neoverse N1: 2×4 vectors take 5.3 cycles where the multiply-adds alone take 4.
    machine, conv = Machine.load("neoverse-n1"), _pointwise(4000, 256, 64)
    small, large = (_dense(conv, columns, (4,) * vectors, machine) for columns, vectors in ((2, 4), (6, 4)))
    assert small > 1.2 * large
    assert large < 1.1 * conv.flops / machine.flops_per_cycle


def test_too_few_registers_spill() -> None:
    conv = _pointwise(700, 128, 64)
    assert _dense(conv, 7, (16,) * 4) > 2 * _dense(conv, 6, (16,) * 4)


def test_narrow_vectors_cost_as_much_as_full_ones_on_full_width_units_only() -> None:
    conv = _pointwise(3136, 96, 24)
    assert _dense(conv, 8, (8, 8, 8)) > 1.3 * _dense(conv, 8, (16, 8))
    assert _dense(conv, 8, (8, 8, 8), ZEN4) < 1.1 * _dense(conv, 8, (16, 8), ZEN4)


def test_narrow_vectors_of_two_columns_cost_as_much_as_one() -> None:
    conv = _pointwise(3136, 96, 24)
    apart, paired = (DenseTiling(8, (16, 8), 1, 1000, 1000, narrow) for narrow in ("alone", "in pairs"))
    ratio = compute_cycles(conv, paired, ZEN5) / compute_cycles(conv, apart, ZEN5)
    assert 0.74 < ratio < 0.8  # three multiply-adds instead of four
    assert (apart.block.accumulators, paired.block.accumulators) == (16, 12)


def test_inputs_that_come_with_their_neighbours_cost_fewer_loads_and_a_register_for_each_column() -> None:
    machine = Target.parse("arm64:cortex-a72").machine
    row = Convolution(1, 1, 1, 1, 1, 1280, 1280)
    one, four = (DenseTiling(1, (4,) * 8, 1, 1, 1, step_channels=step) for step in (1, 4))
    # A load a cycle, with 8 of weights: 9 cycles, and 8.25.
    assert compute_cycles(row, four, machine) == pytest.approx(compute_cycles(row, one, machine) * 8.25 / 9, rel=0.01)
    blocks = [RegisterBlock(6, (4, 4), step_channels=step) for step in (1, 4)]
    assert [block.registers for block in blocks] == [12 + 2 + 1, 12 + 2 + 6]


def test_a_row_of_channels_on_arm_is_loaded_by_vectors() -> None:
    choice = search.choose(Convolution(1, 1, 1, 1, 1, 1280, 1280), Target.parse("arm64:neoverse-n1").machine, 1)
    assert isinstance(choice.tiling, DenseTiling)
    assert (choice.tiling.step_channels, len(choice.tiling.panel)) == (4, 8)


def test_column_tails_cost_what_they_cost() -> None:
    # Fifteen columns in blocks of fourteen leave one, which waits for the latency.
    assert _dense(_pointwise(15, 512, 32), 14, (16, 16)) > 1.2 * _dense(_pointwise(14, 512, 32), 14, (16, 16))


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 9])
def test_tap_uses_against_counting(padding: int, stride: int, dilation: int) -> None:
    size, kernel = 9, 3
    out = max(1, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    conv = Convolution(
        *(1, size, size, out, out, 4, 4, 4),
        (kernel, kernel),
        (stride, stride),
        (padding, padding),
        (dilation, dilation),
    )
    counted = sum(conv.column_valid(column, tap) for column in range(out) for tap in range(kernel))
    assert tap_uses(conv, 0) == tap_uses(conv, 1) == counted


def test_a_volume_costs_as_its_planes_do_for_every_plane_of_the_kernel_inside() -> None:
    plane = Convolution(1, 14, 14, 14, 14, 48, 48, 48, (3, 3), (1, 1), (1, 1))
    tiling = LaneTiling(7, 3, 14, 1)
    volume = replace(plane, depth=Depth(in_planes=6, out_planes=6, kernel=3, padding=1))
    flat, deep = (compute_cycles(conv, tiling, ZEN5) for conv in (plane, volume))
    assert volume.flops == 3 * 6 * plane.flops
    assert volume.depth is not None
    assert volume.depth.uses == 3 * 6 - 2
    assert 0.8 * 16 * flat < deep < 1.05 * 16 * flat


def test_the_epilogue_costs() -> None:
    conv, tiling = _pointwise(3136, 16, 96), DenseTiling(8, (16, 16), 1, 49, 3)
    assert compute_cycles(conv, tiling, ZEN5, 20) > compute_cycles(conv, tiling, ZEN5, 1)


def test_a_long_epilogue_is_not_hidden_by_the_multiplies() -> None:
    conv, tiling = _pointwise(3136, 512, 96), DenseTiling(8, (16, 16), 1, 49, 3)
    vectors = 3136 * 96 / ZEN5.vector_lanes
    added = compute_cycles(conv, tiling, ZEN5, 22) - compute_cycles(conv, tiling, ZEN5, 0)
    assert 0.7 * vectors * 22 / ZEN5.fma_per_cycle <= added <= vectors * 22 / ZEN5.fma_per_cycle


def test_few_columns_of_a_large_window_wait_for_the_latency() -> None:
    large, small = (
        Convolution(1, 64, 64, 64, 64, 32, 32, 32, (size, size), (1, 1), (size // 2, size // 2)) for size in (21, 3)
    )
    few, many = LaneTiling(2, 1, 64, 2), LaneTiling(14, 1, 64, 2)
    assert compute_cycles(large, few, ZEN5) > 1.5 * compute_cycles(large, many, ZEN5)
    assert compute_cycles(small, few, ZEN5) < 2.2 * compute_cycles(small, many, ZEN5)
