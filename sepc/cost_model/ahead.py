"""Weights that a kernel waits for, and those that memory could bring while a kernel computes."""

from __future__ import annotations

from typing import Final

from sepc.cost_model.machine import Machine
from sepc.cost_model.search import Choice
from sepc.cost_model.tiling import DenseTiling, ProductTiling, Tiling
from sepc.cost_model.work import Work
from sepc.ir.convolution import Convolution

LEAST_BYTES: Final = 256 << 10
"""Less is not worth it: on Zen 4, 256 KiB take 9 µs from DRAM and 3 from the third level."""
LINES_PER_STEP: Final = 2
"""Lines that an innermost iteration may fetch beside its own. On Zen 4, 1.25 lines beside seven multiply-adds cost a
pointwise layer of 320→1280 channels 2.5 % (343 to 352 µs); its successor, 1280→1000, then took 70 for 185 µs."""
SHARE_OF_CACHE: Final = 0.5
"""Of the last cache, what may be fetched ahead: the rest is for what is in use."""


def weight_bytes(work: Work) -> int:
    """Bytes of a convolution's weights; 0 if they are no constants, or there are none."""
    stage = work.stage
    if not isinstance(stage, Convolution) or not work.packed:
        return 0
    return stage.element.size_bytes * stage.out_channels * stage.group_in * stage.taps


def packed_bytes(work: Work, tiling: Tiling) -> int:
    """The same as `tiling` has them packed: transformed ones are more."""
    stage = work.stage
    if not isinstance(tiling, ProductTiling) or not isinstance(stage, Convolution):
        return weight_bytes(work)
    product = tiling.product_of(stage)
    return stage.element.size_bytes * tiling.count * product.in_channels * product.out_channels


def awaited_bytes(work: Work, choice: Choice, machine: Machine) -> int:
    """The weights of what reads them from behind the second level for longer than it computes, if these are many."""
    weights, cost = packed_bytes(work, choice.tiling), choice.cost
    inner = ("compute", *(level.name for level in machine.levels[:2]))
    waits = weights >= LEAST_BYTES and cost.bottleneck not in inner and 2 * weights > cost.bytes_moved
    return weights if waits else 0


def idle_bytes(work: Work, choice: Choice, machine: Machine, threads: int) -> int:
    """What memory could bring while a convolution in dense blocks computes, beside its own weights, and it can fetch.

    Of a single image and group only: blocks of others would fetch the same again.
    """
    stage, tiling = work.stage, dense_blocks(choice.tiling)
    weights = packed_bytes(work, choice.tiling)
    if tiling is None or not weights or not isinstance(stage, Convolution) or stage.images * stage.groups > 1:
        return 0
    dram = machine.dram
    rate = dram.combined_bandwidth_bytes_per_cycle(threads) * machine.clock_ghz * 1e3
    steps = stage.flops / 2 / (tiling.columns * sum(tiling.panel) * tiling.step_channels)
    return max(0, min(int(choice.cost.compute_us * rate) - weights, int(LINES_PER_STEP * dram.line_bytes * steps)))


def dense_blocks(tiling: Tiling) -> DenseTiling | None:
    """The blocks that could fetch ahead: a convolution's, or those of its products."""
    if isinstance(tiling, ProductTiling):
        return tiling.product
    return tiling if isinstance(tiling, DenseTiling) else None
