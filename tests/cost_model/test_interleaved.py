"""Tilings of transposed convolutions: one per phase, and together what they cost."""

from __future__ import annotations

import pytest

from sepc.cost_model.interleaved import choose_interleaved
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import choose
from sepc.cost_model.tiling import DenseTiling, InterleavedTiling, LaneTiling
from sepc.ir.phases import Axis, interleave

DENSE = interleave(1, 64, 32, 1, [Axis(14, 28, 4, 2, 1, 1), Axis(14, 28, 4, 2, 1, 1)])
DEPTHWISE = interleave(1, 64, 64, 64, [Axis(14, 28, 4, 2, 1, 1), Axis(14, 28, 4, 2, 1, 1)])


@pytest.mark.parametrize("name", Machine.known())
def test_every_phase_has_a_tiling_and_their_costs_add_up(name: str) -> None:
    machine = Machine.load(name)
    for stage, kind in ((DENSE, DenseTiling), (DEPTHWISE, LaneTiling)):
        choice = choose_interleaved(stage, machine, 1, epilogue_cost=1)
        assert isinstance(choice.tiling, InterleavedTiling)
        assert [type(one) for one in choice.tiling.phases] == [kind] * 4
        alone = [
            choose(phase.convolution, machine, 1, epilogue_cost=1, mixing="nothing").cost for phase in stage.phases
        ]
        assert choice.cost.flops == stage.flops
        saved = 3 * machine.kernel_overhead_us
        assert choice.cost.time_us == pytest.approx(sum(cost.time_us for cost in alone) - saved)


def test_equal_blocks_are_told_once() -> None:
    machine = Machine.load(Machine.known()[0])
    assert str(choose_interleaved(DENSE, machine, 1).tiling).startswith("4 phases: ")
