"""Tensors that lie behind the second-level cache, and that hardware does not fetch in the order in which blocks come.

A block of a dense convolution reads a few cache lines of each of several pixels, all of them at once, and writes and
adds some lines of each of as many. Prefetchers of hardware follow lines that come one after the other, so that each of
these takes an access to the last cache or DRAM, of which few happen at a time. Blocks that fetch such lines themselves,
well before they need them, hide it. (On Arm, where loads are instructions of their own and leave fewer slots for it,
this is not measured, and not done.) Measured on an Emerald Rapids, in µs, multiply-adds alone taking 541:

    256→64 on 56²            714, with the next block's input fetched 611
    64→256 on 56² and a sum  739 to 916, with what the sum reads fetched 625 to 748, with its results too 605 to 658
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, TypeVar

from sepc.cost_model.loops import streamed_footprint
from sepc.cost_model.machine import Machine
from sepc.cost_model.tiling import DenseTiling, Tensor, Tiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.stage import Stage

NEAR_SHARE: Final = 0.25
"""What takes so much of a second-level cache at most counts as there, left by the kernel before or the call before."""
MOST_PANEL_VECTORS: Final = 32
"""Vectors of output channels up to which a block's input is fetched: every panel does so, and only the first one gains.
(728→728 on 19², 46 vectors: 2 % slower.)"""
MOST_PRODUCTS: Final = 512
"""Products per result up to which results, and what is added to them, are fetched: each step takes an instruction more,
and the more steps, the less there is to hide. (1024→2048 on 7²: 8 % slower.)"""

TilingT = TypeVar("TilingT", bound=Tiling)


def with_fetches(
    tiling: TilingT,
    stage: Stage,
    machine: Machine,
    threads: int,
    *,
    operand_bytes: float = 0,
    reads: bool = True,
    writes: bool = True,
) -> TilingT:
    """`tiling` of `stage` with the tensors that its blocks had better fetch; others than dense blocks fetch none.

    Args:
        tiling: without any.
        stage: the problem.
        machine: the machine.
        threads: threads, each on a core of its own.
        operand_bytes: bytes of the tensors that the epilogue reads.
        reads: whether its input is a tensor, no part of a kernel.
        writes: the same of its results.
    """
    if not isinstance(stage, Convolution) or stage.depth or not isinstance(tiling, DenseTiling):
        return tiling
    if not machine.has_memory_operands:
        return tiling
    whole, vectors = streamed_footprint(stage), ceil_div(stage.out_channels, machine.lanes(stage.element))
    near_bytes = NEAR_SHARE * machine.levels[1].size_per_core_bytes(threads) * threads
    # Blocks of more taps read most of their input again, and compute for longer with it.
    reads = reads and stage.taps == stage.groups == 1 and vectors <= MOST_PANEL_VECTORS
    writes = writes and stage.taps * stage.group_in <= MOST_PRODUCTS
    sizes: list[tuple[Tensor, bool, float]] = [
        ("input", reads, whole.activations),
        ("operands", writes, operand_bytes),
        ("results", writes, whole.results),
    ]
    return replace(tiling, fetched=tuple(name for name, gains, size in sizes if gains and size > near_bytes))
