"""Planners: what passes are told for a CPU and for a GPU."""

from __future__ import annotations

import pytest

from sepc.cost_model.chain import choose_chain
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_planner import GpuPlanner
from sepc.cost_model.gpu_tiling import GpuTiling
from sepc.cost_model.group_normalization import choose_group_normalization
from sepc.cost_model.interleaved import choose_interleaved
from sepc.cost_model.machine import Machine
from sepc.cost_model.planner import CpuPlanner, planner_of
from sepc.cost_model.search import choose
from sepc.cost_model.tiling import DenseTiling, InterleavedTiling, LaneTiling, ProductTiling, RowTiling
from sepc.cost_model.work import Work
from sepc.ir.convolution import Convolution
from sepc.ir.depth import Depth
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Axis, interleave
from sepc.ir.stage import Chain, Map, Normalization, Pooling, Stage

ZEN5, A100 = Machine.load("znver5"), GpuMachine.load("sm_80")
CPU, GPU = CpuPlanner(ZEN5, 2), GpuPlanner(A100)
ROW = Convolution(1, 1, 784, 1, 784, 64, 128)
EXPAND = Convolution(1, 28, 28, 28, 28, 32, 192)
DEPTHWISE = Convolution(1, 28, 28, 28, 28, 192, 192, 192, (3, 3), (1, 1), (1, 1))
NORMALIZATION = Normalization((1, 28, 28, 192), 1e-5)
GROUPS = GroupNormalization((1, 28, 28, 32), 4, 1e-5)
POOL = Pooling(1, 28, 28, 14, 14, 32, True, kernel=(2, 2), stride=(2, 2))


def test_a_machine_has_the_planner_of_its_kind() -> None:
    assert planner_of(ZEN5, 2) == CPU
    assert planner_of(A100, 2) == GPU


def test_the_cpus_planner_asks_what_chooses_for_each_stage() -> None:
    work = Work(ROW, 3, 1000, "pixels")
    assert CPU.choose(work) == choose(ROW, ZEN5, 2, epilogue_cost=3, operand_bytes=1000, mixing="pixels")
    assert CPU.choose(work, "memory") == choose(ROW, ZEN5, 2, epilogue_cost=3, operand_bytes=1000, mixing="nothing")
    groups = choose_group_normalization(GROUPS, ZEN5, 2, epilogue_cost=3, operand_bytes=0)
    assert CPU.choose(Work(GROUPS, 3)) == groups
    links = (Work(EXPAND, 2), Work(DEPTHWISE, 1, 500))
    chain = Chain((EXPAND, DEPTHWISE))
    assert CPU.choose_chain(links) == choose_chain(chain, ZEN5, 2, epilogue_costs=(2, 1), operand_bytes=500)
    assert CPU.chain_scratch_bytes(links) == 2 * chain.ring_bytes(1)
    assert (CPU.between_us, CpuPlanner(ZEN5, 1).between_us) == (ZEN5.barrier_us, 0.0)


def test_convolutions_and_chains_of_them_get_tilings_of_blocks() -> None:
    for work in (Work(ROW), Work(DEPTHWISE), Work(EXPAND)):
        assert isinstance(GPU.choose(work).tiling, GpuTiling)
    found = GPU.choose_chain([Work(EXPAND, 2), Work(DEPTHWISE, 1, 500)])
    assert found is not None
    assert isinstance(found.tiling, GpuTiling)
    assert len(found.tiling.links) == 2


@pytest.mark.parametrize("stage", [NORMALIZATION, Map((1, 28, 28, 192)), POOL])
def test_other_stages_are_no_links_on_a_gpu(stage: Stage) -> None:
    assert GPU.choose_chain([Work(stage), Work(EXPAND)]) is None
    assert GPU.choose_chain([Work(DEPTHWISE), Work(stage)]) is None


def test_a_gpu_has_no_algorithm_that_takes_scratch_and_gathers_nothing() -> None:
    square = Convolution(1, 56, 56, 56, 56, 64, 64, kernel=(3, 3), padding=(1, 1))
    assert any(
        isinstance(one.tiling, ProductTiling) for one in (CPU.choose(Work(square)), *CPU.choose(Work(square)).others)
    )
    assert GPU.choose(Work(square, mixing="pixels")).others == ()
    assert (CPU.gathers_row_means([DEPTHWISE]), CPU.gathers_row_means([EXPAND])) == (True, False)
    assert CPU.gathers_row_means([EXPAND, DEPTHWISE, EXPAND])
    assert not GPU.gathers_row_means([DEPTHWISE])
    assert GPU.chain_scratch_bytes([Work(EXPAND), Work(DEPTHWISE)]) == GPU.between_us == 0


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Work(ROW, packed=False), DenseTiling),
        (Work(Convolution(1, 9, 9, 9, 9, 8, 8, 4, (3, 3), (1, 1), (1, 1))), LaneTiling),
        (Work(Convolution(1, 9, 9, 9, 9, 16, 16, 2, (3, 3), (1, 1), (1, 1))), DenseTiling),
        (Work(Convolution(1, 9, 9, 9, 9, 8, 6, depth=Depth(3, 3))), DenseTiling),
        (Work(POOL), LaneTiling),
        (Work(Map((784, 192))), RowTiling),
        (Work(GROUPS), RowTiling),
    ],
)
def test_what_no_block_computes_together_has_a_small_task_per_thread(work: Work, expected: type) -> None:
    found = GPU.choose(work)
    assert type(found.tiling) is expected
    assert found.cost.time_us > A100.launch_us
    assert found.cost.bytes_moved > 0


def test_a_transposed_convolution_has_tasks_of_each_phase() -> None:
    stage = interleave(1, 8, 12, 1, [Axis(8, 16, 4, 2, 1, 1), Axis(8, 16, 4, 2, 1, 1)])
    found = GPU.choose(Work(stage))
    assert isinstance(found.tiling, InterleavedTiling)
    assert len(found.tiling.phases) == 4
    assert choose_interleaved(stage, ZEN5, 2) == CPU.choose(Work(stage))


@pytest.mark.parametrize("planner", [CPU, GPU])
def test_what_computes_nothing_has_no_tiling(planner: CpuPlanner | GpuPlanner) -> None:
    empty = Convolution(0, 28, 28, 28, 28, 32, 192)
    for works in ([Work(empty)], [Work(Map((0, 4)))], [Work(GroupNormalization((0, 4, 4, 8), 2, 1e-5))]):
        with pytest.raises(ValueError, match="computes nothing"):
            planner.choose(works[0])
    with pytest.raises(ValueError, match="computes nothing"):
        planner.choose_chain([Work(empty), Work(DEPTHWISE)])


def test_a_transposed_convolution_is_no_link() -> None:
    with pytest.raises(ValueError, match="no link of a chain"):
        _ = Work(GROUPS).link
