"""Tilings and times of what is no chain of convolutions: kernels whose many small tasks the threads of a GPU share.

The same kernels run on a CPU's threads, each of which takes some tasks one after the other. On a GPU there are as many
threads as tasks, tasks are as small as can be, and those next to each other are of vectors next to each other.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

from sepc.cost_model.gpu_blocks import MISS_CYCLES, SCHEDULERS, BlockWork
from sepc.cost_model.gpu_latency import Grid, Moved
from sepc.cost_model.gpu_machine import VECTOR, GpuMachine, lanes_of
from sepc.cost_model.latency import Cost, in_sequence
from sepc.cost_model.loops import Footprint, streamed_footprint
from sepc.cost_model.search import Choice, require_work
from sepc.cost_model.tasks import task_counts
from sepc.cost_model.tiling import DenseTiling, InterleavedTiling, LaneTiling, RowTiling, StageTiling
from sepc.cost_model.traffic import missing_part
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import Convolution
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Interleaved
from sepc.ir.stage import Map, Normalization, Pooling, Stage

THREADS: Final = 128
"""Threads of a block of such a kernel."""
REGISTERS: Final = 64
COLUMNS: Final = (1, 2, 4)
"""Columns of a task of a convolution."""
CYCLES_PER_INSTRUCTION: Final = 4.0
"""Of a thread alone: each instruction waits for the one before (Jia et al., arXiv 1903.07486)."""
OVERHEAD_INSTRUCTIONS: Final = 40
"""Where a task is, and its loops."""
GROUP_NORMALIZATION_TASKS: Final = 64
"""Tasks of an image: each of them merges what all of them found."""
SCATTERED_READS: Final = 2.0
"""Bytes that come per byte that is used where neighbouring threads read rows of their own: half of each sector."""


@lru_cache(maxsize=4096)
def choose_tasks(
    stage: Stage | Interleaved | GroupNormalization, machine: GpuMachine, epilogue_cost: int, operand_bytes: int
) -> Choice:
    """The tiling of least predicted time for `stage`; raises ValueError if there is nothing to do."""
    match stage:
        case GroupNormalization():
            return _group_normalization(stage, machine, epilogue_cost, operand_bytes)
        case Interleaved():
            return _interleaved(stage, machine, epilogue_cost, operand_bytes)
    require_work(stage)
    choices = (
        Choice(tiling, predict_tasks(stage, tiling, machine, epilogue_cost, operand_bytes))
        for tiling in small_tilings(stage)
    )
    return min(choices, key=lambda one: one.cost.time_us)


def small_tilings(stage: Stage) -> list[StageTiling]:
    """Tilings of `stage` whose tasks are small."""
    match stage:
        case Convolution() if stage.lanewise(lanes_of(stage.element)):
            return [LaneTiling(min(count, stage.out_width), 1, 1, 1, blocks=1) for count in COLUMNS]
        case Convolution():
            panel = split_lanes(min(VECTOR, stage.group_out), VECTOR)
            return [DenseTiling(min(count, stage.out_width), panel, 1, 1, 1) for count in COLUMNS]
        case Pooling():
            return [LaneTiling(1, 1, 1, 1)]
        case Normalization() | Map():
            return [RowTiling(1)]


def predict_tasks(
    stage: Stage, tiling: StageTiling, machine: GpuMachine, epilogue_cost: int = 0, operand_bytes: int = 0
) -> Cost:
    """The cost of `stage` under `tiling`; arguments as of `sepc.cost_model.latency.predict`."""
    # Of what is elementwise, each vector is a task, whatever its row.
    elements = math.prod(stage.extents) if isinstance(stage, Map) else 0
    lanes = lanes_of(stage.element)
    tasks = ceil_div(elements, lanes) or math.prod(task_counts(stage, tiling, lanes))
    whole = streamed_footprint(stage, operand_bytes)
    results = whole.results / stage.element.size_bytes
    # Two operations are a multiply-add, and a load.
    instructions = stage.flops + results * (epilogue_cost + 1)
    scattered = SCATTERED_READS if isinstance(stage, Normalization) else 1.0
    return _cost(stage.flops, tasks, instructions / tasks, whole, scattered, machine)


def _cost(flops: int, tasks: int, instructions: float, whole: Footprint, scattered: float, machine: GpuMachine) -> Cost:
    """The cost of so many tasks of so many instructions, which touch `whole` together."""
    l2_bytes = scattered * whole.tensors + whole.weights
    grid = Grid(ceil_div(tasks, THREADS), machine.resident_blocks(THREADS, REGISTERS, 0), machine)
    return cost_of_blocks(flops, grid, THREADS, instructions, whole, l2_bytes)


def cost_of_blocks(
    flops: int,
    grid: Grid,
    threads: int,
    instructions: float,
    whole: Footprint,
    l2_bytes: float,
    waiting_cycles: float = 0.0,
) -> Cost:
    """The cost of blocks of `threads` threads.

    Args:
        flops: floating-point operations of all.
        grid: the blocks.
        threads: of each.
        instructions: of a thread, beside `OVERHEAD_INSTRUCTIONS`; half of them are taken to be accesses.
        whole: what all of them touch, once.
        l2_bytes: between them and the second level.
        waiting_cycles: of a thread, beside those for its instructions and the first miss.
    """
    machine = grid.machine
    executed, warps = OVERHEAD_INSTRUCTIONS + instructions, ceil_div(threads, machine.warp_size)
    latency = MISS_CYCLES + CYCLES_PER_INSTRUCTION * executed + waiting_cycles
    work = BlockWork(warps * executed / SCHEDULERS, 0.0, warps * instructions / 2, latency)
    missing = missing_part(whole.total / (machine.l2_kib * 1024))
    moved = Moved(l2_bytes, missing * whole.tensors + whole.weights)
    return grid.cost(flops, work, moved, whole.total)


def _group_normalization(
    stage: GroupNormalization, machine: GpuMachine, epilogue_cost: int, operand_bytes: int
) -> Choice:
    """Two kernels, each of which reads everything."""
    if stage.flops == 0:
        raise ValueError(f"{stage} computes nothing: no batch, map or channel may be 0")
    rows = ceil_div(stage.pixels, GROUP_NORMALIZATION_TASKS)
    tasks, elements = stage.images * ceil_div(stage.pixels, rows), stage.images * stage.pixels * stage.channels
    size = float(stage.element.size_bytes * elements)
    read, written = Footprint(size, 0.0, 0.0), Footprint(size + operand_bytes, 0.0, size)
    per_task = elements / tasks
    costs = [
        _cost(stage.flops // 2, tasks, 4 * per_task, read, SCATTERED_READS, machine),
        _cost(stage.flops - stage.flops // 2, tasks, (4 + epilogue_cost) * per_task, written, SCATTERED_READS, machine),
    ]
    return Choice(RowTiling(rows), in_sequence(costs, 0.0))


def _interleaved(stage: Interleaved, machine: GpuMachine, epilogue_cost: int, operand_bytes: int) -> Choice:
    """One kernel, whose phases come one after the other."""
    operand_bytes //= len(stage.phases)
    phases = [choose_tasks(phase.convolution, machine, epilogue_cost, operand_bytes) for phase in stage.phases]
    tilings = tuple(one.tiling for one in phases if isinstance(one.tiling, DenseTiling | LaneTiling))
    whole = in_sequence([one.cost for one in phases], -machine.launch_us)
    return Choice(InterleavedTiling(tilings), whole)
