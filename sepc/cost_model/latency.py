"""Predicted time of a stage under a tiling: arithmetic with the real register blocks against bytes over bandwidth.

The arithmetic comes from `sepc.cost_model.cycles`, the bytes from `sepc.cost_model.traffic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sepc.cost_model.blocks import SPILL_FACTOR, unrolls_tight_blocks
from sepc.cost_model.cycles import compute_cycles
from sepc.cost_model.loops import Footprint, streamed_footprint
from sepc.cost_model.machine import Machine
from sepc.cost_model.tasks import shares_rows
from sepc.cost_model.tiling import DenseTiling, ProductTiling, Tiling
from sepc.cost_model.traffic import Nest, nest_of
from sepc.ir.arithmetic import ceil_div
from sepc.ir.stage import Stage

# From the same timings as the constants of `sepc.cost_model.blocks`.
TASK_CYCLES: Final = 25.0
"""Taking up a task: a few integer divisions to find its place (fits: dense 48, lanewise 4; poorly determined)."""
UNHIDDEN_SHARE: Final = 0.2
"""Part of the shorter of the times for bytes and arithmetic that the longer does not hide (fits: dense 0.08,
lanewise 0.36, the latter while others used the shared cache)."""
UNHIDDEN_SHARE_OF_PRODUCTS: Final = 0.8
"""The same of Strassen's and Winograd's products, times the part of all instructions that multiply-adds can be.

The fewer these are, the better bytes hide: it makes as much on Zen 5, and two thirds on Zen 4. There four layers of
MobileNet V1 and Xception took 1.01 to 1.07 times as long as their multiply-adds alone, 1.09 to 1.18 being predicted
without this. MobileNetV4 was 1.03 times as fast with two fifths, by which 13 layers are computed so; with two thirds
12 are, without this 3. On an Emerald Rapids it makes 0.27; 80 layers of eight networks fitted 0.38, and plain products
0.29. EdgeNeXt was 1.05 times as fast by it as with 0.2, MobileNetV2 1.01, seven others 0.994 to 1.007; with 0.4
MobileOne 0.96.
"""


@dataclass(frozen=True)
class Cost:
    """What a stage costs under a tiling.

    Attributes:
        flops: floating-point operations.
        compute_us: microseconds if only arithmetic counted.
        bytes_per_level: bytes that come from (or go to) each memory level behind the first, over all threads.
        bytes_moved: compulsory bytes: input, weights and output once.
        time_us: predicted microseconds on the given number of threads.
        bottleneck: 'compute', or the memory level that takes longest.
    """

    flops: int
    compute_us: float
    bytes_per_level: tuple[tuple[str, float], ...]
    bytes_moved: float
    time_us: float
    bottleneck: str


def predict(
    stage: Stage, tiling: Tiling, machine: Machine, threads: int, *, epilogue_cost: int = 0, operand_bytes: int = 0
) -> Cost:
    """The cost of `stage` under `tiling` on `threads` threads.

    Args:
        stage: the problem.
        tiling: its blocking.
        machine: the machine.
        threads: threads, each on a core of its own.
        epilogue_cost: vector instructions per vector of results (activation, residual add, …).
        operand_bytes: bytes of the tensors that the epilogue reads.
    """
    threads = max(1, threads)
    nest = nest_of(stage, tiling, machine.lanes(stage.element), threads, operand_bytes)
    cycles = compute_cycles(stage, tiling, machine, epilogue_cost) * nest.share
    if isinstance(tiling, DenseTiling) and unrolls_tight_blocks(stage, tiling, machine):
        cycles *= SPILL_FACTOR
    cycles += TASK_CYCLES * ceil_div(nest.tasks, threads)
    moved = streamed_footprint(stage, operand_bytes).total
    fetched = _fetched(nest, machine, threads)
    unhidden = UNHIDDEN_SHARE
    if isinstance(tiling, ProductTiling):
        unhidden = UNHIDDEN_SHARE_OF_PRODUCTS * machine.multiply_add_share
    remote = _remote_bytes(stage, tiling, nest, machine, threads)
    waiting = machine.last_cache.read_cycles(remote, 0.0, threads)
    return time_of(stage.flops, cycles, fetched, machine, threads, moved, unhidden, waiting)


def _remote_bytes(stage: Stage, tiling: Tiling, nest: Nest, machine: Machine, threads: int) -> float:
    """What a thread reads of the activations that another one has computed, and has in its own caches.

    The stage before is taken to have been shared out by rows. They come from core to core, a line at a time, and what
    is written to where another core has read takes as long: on an Emerald Rapids 192→192 on 28² took 331 µs on one
    core and 231 on two that share channels, and the depthwise layers between 22 and 53. MobileOne is 1.17 times as fast
    on two cores if both share rows, MobileNetV2 and EfficientNet-Lite0 1.09. So long a wait is not hidden.
    """
    if threads == 1:
        return 0.0
    touched, own = nest.footprints[0].activations, streamed_footprint(stage).activations / threads
    if shares_rows(stage, tiling, machine.lanes(stage.element), threads):
        return max(0.0, touched - own)
    return touched * (1 - 1 / threads)


def time_of(
    flops: int,
    cycles: float,
    fetched: Sequence[Footprint],
    machine: Machine,
    threads: int,
    bytes_moved: float,
    unhidden: float = UNHIDDEN_SHARE,
    waiting_cycles: float = 0.0,
) -> Cost:
    """The cost of `cycles` of arithmetic on the busiest thread, which moves `fetched` per level behind the first.

    Args:
        flops: floating-point operations of all threads.
        cycles: cycles of one core.
        fetched: bytes of one thread, one entry per level of `machine` but the first.
        machine: the machine.
        threads: threads, each on a core of its own.
        bytes_moved: compulsory bytes.
        unhidden: the part of the shorter times that the longest does not hide.
        waiting_cycles: what nothing hides.
    """
    times = {"compute": cycles}
    for level, footprint in zip(machine.levels[1:], fetched, strict=True):
        read = footprint.activations + footprint.operands
        streamed = max(0.0, read - footprint.read_strips) + footprint.weights
        reads = level.read_cycles(streamed, footprint.read_strips, threads)
        written = max(0.0, footprint.results - footprint.written_strips)
        times[level.name] = reads + level.write_cycles(written, footprint.written_strips, threads)
    bottleneck = max(times, key=lambda name: times[name])
    longest = times[bottleneck]
    total = longest + unhidden * (sum(times.values()) - longest) + waiting_cycles
    bytes_per_level = tuple(
        (level.name, footprint.total * threads) for level, footprint in zip(machine.levels[1:], fetched, strict=True)
    )
    time_us = machine.cycles_to_us(total) + machine.kernel_overhead_us
    return Cost(flops, machine.cycles_to_us(cycles), bytes_per_level, bytes_moved, time_us, bottleneck)


def in_sequence(costs: Sequence[Cost], between_us: float) -> Cost:
    """The cost of one after the other, with `between_us` after each but the last (less than 0: what it saves)."""
    longest = max(costs, key=lambda cost: cost.time_us)
    levels = [name for name, _ in longest.bytes_per_level]
    bytes_per_level = tuple((name, sum(dict(cost.bytes_per_level)[name] for cost in costs)) for name in levels)
    return Cost(
        sum(cost.flops for cost in costs),
        sum(cost.compute_us for cost in costs),
        bytes_per_level,
        sum(cost.bytes_moved for cost in costs),
        sum(cost.time_us for cost in costs) + (len(costs) - 1) * between_us,
        longest.bottleneck,
    )


def _fetched(nest: Nest, machine: Machine, threads: int) -> list[Footprint]:
    """Per level behind the first: what the busiest thread moves between it and the levels before it.

    Activations that fit a cache are taken to be there already, left by the stage before. Weights are not: since their
    last use the other layers' weights have passed through all but the last cache.
    """
    fetched = []
    for cache in machine.levels[:-1]:
        footprint = nest.into_cache(cache.size_per_core_bytes(threads), first_level=cache is machine.levels[0])
        if cache is not machine.last_cache and footprint.weights == 0:
            footprint = footprint._replace(weights=nest.footprints[0].weights)
        fetched.append(footprint)
    return fetched
