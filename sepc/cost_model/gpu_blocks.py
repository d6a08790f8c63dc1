"""What one thread block executes: instructions, accesses to shared memory and to the first-level cache, and registers.

Counted per item of work (see `sepc.cost_model.gpu_tiling`). A dense item adds, per input channel and tap, one number of
the input for each of its columns times a vector of weights; it loads vectors of `VECTOR` input channels. A depthwise
item slides over the columns that its own read, row of taps by row of taps. What the code takes besides, for addresses
and loops, is estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sepc.cost_model.gpu_machine import VECTOR, GpuMachine
from sepc.cost_model.gpu_tiling import GpuLink, Tile, is_dense, read_extent
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.element import FLOAT16, Element

SCHEDULERS: Final = 4
"""Instructions of a warp that a multiprocessor issues per cycle (NVIDIA, 'CUDA C++ Programming Guide')."""
ADDRESS_INSTRUCTIONS: Final = 8
"""Per item: where it is, and whether that is inside of the image."""
STEP_INSTRUCTIONS: Final = 2
"""Per step of a dense item: part of the loop, and of the addresses, as loops are unrolled."""
CONVERSIONS: Final = VECTOR
"""Instructions that a vector of halves takes on its way to or from registers, which hold float32."""
EPILOGUE_INSTRUCTIONS: Final = 6
"""Per vector of results, beside its elementwise operators: where it goes, and its store."""
HIT_CYCLES: Final = 33.0
"""Latency of shared memory and of hits of the first level (Jia et al., arXiv 1903.07486: 19 and 32 on a T4)."""
STEPS_TOGETHER: Final = 2
"""Steps whose loads are under way at the same time, as loops are unrolled (estimate)."""
MISS_CYCLES: Final = 240.0
"""Latency of the second level (the same: 188; and on the way through a busy one more)."""
BARRIER_CYCLES: Final = 40.0
"""Estimate: all warps arrive, and go on."""
BASE_REGISTERS: Final = 40
"""Addresses, indices and loop counters, with room for what nvcc keeps ready."""
LINK_REGISTERS: Final = 16
"""The same for each link more."""
LOADS_AHEAD_REGISTERS: Final = 128
"""What nvcc takes of a kernel whose last link is dense, to load steps ahead, if that many are free.

With these, 83 kernels of single layers and chains, with random tilings of those that the planner considers, took no
more than is estimated (nvcc 13 for sm_80), though two spilled 8 bytes all the same; nor did the 24 of MobileNetV2 for
sm_75, none of which spilled.
"""


class BlockWork(NamedTuple):
    """Cycles of a multiprocessor that has the work to itself.

    Attributes:
        issue_cycles: to issue all instructions. multiply_add_cycles: those of multiply-adds alone.
        access_cycles: of accesses to shared memory and the first-level cache.
        latency_cycles: how long it takes at least, as each warp waits for its loads and at barriers.
    """

    issue_cycles: float
    multiply_add_cycles: float
    access_cycles: float
    latency_cycles: float

    def spread(self, count: int, threads: int, warp: int) -> BlockWork:
        """If this is what a warp does for an item per thread: what `threads` threads do for `count` items."""
        warps, rounds = ceil_div(count, warp), ceil_div(count, threads)
        return BlockWork(
            warps * self.issue_cycles,
            warps * self.multiply_add_cycles,
            warps * self.access_cycles,
            rounds * self.latency_cycles,
        )

    def plus(self, other: BlockWork, times: int = 1) -> BlockWork:
        """This, and then `other`, so many times."""
        return BlockWork(*(own + times * more for own, more in zip(self, other, strict=True)))


NOTHING: Final = BlockWork(0.0, 0.0, 0.0, 0.0)


def item_work(
    conv: Convolution, link: GpuLink, epilogue_cost: int, machine: GpuMachine, *, from_global: bool
) -> BlockWork:
    """What a warp does for an item of `conv` per thread.

    Args:
        conv: the link.
        link: its register block.
        epilogue_cost: instructions per vector of results that its elementwise operators take.
        machine: the GPU.
        from_global: whether it reads global memory rather than shared.
    """
    vectors = link.pixels * link.vectors
    others = ADDRESS_INSTRUCTIONS + vectors * (VECTOR * epilogue_cost + EPILOGUE_INSTRUCTIONS)
    multiply_adds = VECTOR * vectors * conv.group_in * conv.taps
    lines = 1
    if is_dense(conv):
        steps = ceil_div(conv.group_in, VECTOR) * conv.taps
        loads = link.pixels * steps + link.vectors * conv.group_in * conv.taps
        others += STEP_INSTRUCTIONS * steps
        lines = ceil_div(conv.in_channels * conv.element.size_bytes, machine.line_bytes)
    else:
        steps = conv.kernel[0]
        loads = link.vectors * (conv.kernel[0] * _row_loads(conv, link) + conv.taps)
        others += loads
    if conv.element == FLOAT16:
        others += CONVERSIONS * (loads + vectors)
    instructions = multiply_adds + loads + others
    vector_cycles = VECTOR * conv.element.size_bytes * machine.warp_size / machine.shared_bytes_per_cycle
    # Lines of the input come anew, one after the other if they are those of one pixel.
    latency = instructions + HIT_CYCLES * steps / STEPS_TOGETHER + (MISS_CYCLES * lines if from_global else 0.0)
    return BlockWork(
        instructions / SCHEDULERS,
        multiply_adds * machine.warp_size / machine.fp32_lanes,
        (loads + vectors) * vector_cycles,
        latency,
    )


def _row_loads(conv: Convolution, link: GpuLink) -> int:
    """Vectors of the input that a depthwise item loads per row of taps."""
    span = read_extent(link.pixels, conv.kernel[1], conv.stride[1], conv.dilation[1])
    return min(span, link.pixels * conv.kernel[1])


def copy_work(tile: Tile, element: Element, threads: int, machine: GpuMachine) -> BlockWork:
    """What a block does to copy `tile`, of numbers of that type, to shared memory."""
    vector_cycles = element.size_bytes * VECTOR * machine.warp_size / machine.shared_bytes_per_cycle
    instructions = 2 + ADDRESS_INSTRUCTIONS
    item = BlockWork(instructions / SCHEDULERS, 0.0, 2 * vector_cycles, instructions)
    work = item.spread(tile.rows * tile.columns * ceil_div(tile.channels, VECTOR), threads, machine.warp_size)
    return work._replace(latency_cycles=work.latency_cycles + MISS_CYCLES)


def registers_of(links: Sequence[Convolution], held: Sequence[GpuLink]) -> int:
    """Registers of a thread, at most: sums of the last link, those of another with its operands, and the rest.

    Generous, as what does not fit would be spilled to memory.
    """
    sums = [VECTOR * link.pixels * link.vectors for link in held]
    operands = [_operands(conv, link) for conv, link in zip(links, held, strict=True)]
    # The sums of a dense last link are there while the links before it compute.
    kept = sums[-1] if is_dense(links[-1]) else 0
    needed = [own + operand + kept for own, operand in zip(sums[:-1], operands[:-1], strict=True)]
    base = BASE_REGISTERS + LINK_REGISTERS * (len(links) - 1)
    estimate = base + max([*needed, sums[-1] + operands[-1]])
    return max(estimate, LOADS_AHEAD_REGISTERS) if is_dense(links[-1]) else estimate


def _operands(conv: Convolution, link: GpuLink) -> int:
    """Registers for what is loaded at a time: of a dense link two steps' inputs, of a depthwise one a row of taps'."""
    if is_dense(conv):
        return VECTOR * (2 * link.pixels + VECTOR * link.vectors)
    return VECTOR * (_row_loads(conv, link) + conv.kernel[1])
