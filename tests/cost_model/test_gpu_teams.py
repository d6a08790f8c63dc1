"""Teams of threads: which a GPU can hold, and where they pay."""

from __future__ import annotations

import pytest

from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_planner import GpuPlanner
from sepc.cost_model.gpu_teams import choose_teams, predict_teams, team_footprint, team_tilings
from sepc.cost_model.loops import streamed_footprint
from sepc.cost_model.tiling import LaneTiling, RowTiling, TeamTiling
from sepc.cost_model.work import Work
from sepc.ir.element import FLOAT16
from sepc.ir.stage import Map, Normalization, Pooling, Softmax, Stage

A100, OPENCL = GpuMachine.load("sm_80"), GpuMachine.load("opencl")
WIDE = Normalization((1, 1, 196, 768), 1e-6)
POOLING = Pooling(1, 7, 7, 1, 1, 1280, maximum=False, adaptive=True)
REDUCING: list[Stage] = [WIDE, Softmax((8, 49, 49, 49)), POOLING, Pooling(3, 9, 9, 1, 1, 10, False, adaptive=True)]


@pytest.mark.parametrize("stage", REDUCING, ids=repr)
@pytest.mark.parametrize("machine", [A100, OPENCL], ids=lambda machine: machine.name)
def test_blocks_fit_the_machine_and_have_no_team_without_a_task(stage: Stage, machine: GpuMachine) -> None:
    tilings = list(team_tilings(stage, machine))
    assert tilings
    tasks = stage.pixels if isinstance(stage, Normalization) else stage.batch * -(-stage.out_channels // 4)
    for tiling in tilings:
        assert tasks % tiling.teams == 0
        assert tiling.threads <= machine.threads_per_block
        assert tiling.members & (tiling.members - 1) == 0


@pytest.mark.parametrize("stage", [WIDE, POOLING], ids=repr)
def test_long_reductions_are_for_teams(stage: Stage) -> None:
    choice = GpuPlanner(A100).choose(Work(stage))
    assert isinstance(choice.tiling, TeamTiling)
    assert isinstance(choice.tiling.task, RowTiling if isinstance(stage, Normalization) else LaneTiling)
    assert choice.tiling.row_wise == isinstance(stage, Normalization)


@pytest.mark.parametrize(
    "stage",
    [Softmax((1, 1, 5, 3)), Map((10, 50)), Pooling(1, 8, 8, 4, 4, 64, False, kernel=(2, 2), stride=(2, 2))],
    ids=repr,
)
def test_what_has_little_to_reduce_is_not(stage: Stage) -> None:
    assert choose_teams(stage, A100, 0, 0) is None
    assert not isinstance(GpuPlanner(A100).choose(Work(stage)).tiling, TeamTiling)


def test_each_block_reads_the_weights_of_a_normalisation_and_half_the_bytes_in_float16() -> None:
    tiling = TeamTiling(RowTiling(1), 32, 4, row_wise=True, width=1)
    once = streamed_footprint(WIDE)
    assert team_footprint(WIDE, tiling) == once._replace(weights=once.weights * 196 // 4)
    assert team_footprint(WIDE.of(FLOAT16), tiling).total == team_footprint(WIDE, tiling).total / 2
    assert predict_teams(WIDE, tiling, A100).bytes_moved == once.total
    with pytest.raises(ValueError, match="nothing for teams"):
        predict_teams(Map((3, 4)), tiling, A100)
