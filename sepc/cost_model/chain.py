"""Cost and tiling of chains of convolutions: arithmetic and traffic of the links, over a moving window of rows.

One turn of the window makes `step` rows of the result: a piece of each link, one after the other. If the input rows,
ring buffers, weights and output rows of a turn fit a cache together, only the chain's input, weights and result pass
into it, once. If not, each link's piece moves what it would by itself, every turn. No formula is specific to a kind of
link.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Final

from sepc.cost_model.latency import TASK_CYCLES, Cost, compute_cycles, time_of
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import Choice, register_blocks
from sepc.cost_model.tiling import ChainTiling, DenseTiling, LaneTiling
from sepc.cost_model.traffic import FP32_BYTES, Footprint, nest_of
from sepc.ir.stage import Chain, Convolution, ceil_div

STEPS: Final = (1, 2, 4, 8)


@lru_cache(maxsize=4096)
def choose_chain(
    chain: Chain, machine: Machine, threads: int, *, epilogue_costs: tuple[int, ...], operand_bytes: int = 0
) -> Choice:
    """The tiling of least predicted time for `chain`; `epilogue_costs` has one entry per link (see `choose`)."""
    blocks = tuple(_best_block(link, machine, cost) for link, cost in zip(chain.links, epilogue_costs, strict=True))
    height = chain.links[-1].out_height
    counts = sorted({1, *(threads * factor for factor in (1, 2, 3, 4))})
    rows = sorted({ceil_div(height, count) for count in counts if count <= height}, reverse=True)
    tilings = [ChainTiling(blocks, row, step) for row in rows for step in STEPS if step <= row]
    choices = [
        Choice(tiling, predict_chain(chain, tiling, machine, threads, epilogue_costs, operand_bytes))
        for tiling in tilings
    ]
    return min(choices, key=lambda choice: choice.cost.time_us)


def _best_block(link: Convolution, machine: Machine, epilogue_cost: int) -> DenseTiling | LaneTiling:
    blocks = [block for block in register_blocks(link, machine) if isinstance(block, DenseTiling | LaneTiling)]
    return min(blocks, key=lambda block: compute_cycles(link, block, machine, epilogue_cost))


def predict_chain(
    chain: Chain,
    tiling: ChainTiling,
    machine: Machine,
    threads: int,
    epilogue_costs: tuple[int, ...],
    operand_bytes: int = 0,
) -> Cost:
    """The cost of `chain` under `tiling` on `threads` threads; arguments as in `sepc.cost_model.latency.predict`."""
    last = chain.links[-1]
    tasks = last.batch * ceil_div(last.out_height, tiling.rows)
    own_tasks = ceil_div(tasks, max(1, threads))
    turns = own_tasks * ceil_div(tiling.rows, tiling.step)
    cycles = TASK_CYCLES * (own_tasks + turns)
    for link, block, rows, cost in zip(
        chain.links, tiling.links, chain.rows_for(tiling.rows), epilogue_costs, strict=True
    ):
        per_row = compute_cycles(link, block, machine, cost) / (link.batch * link.out_height)
        cycles += own_tasks * rows * per_row
    fetched = []
    for cache in machine.levels[:-1]:
        capacity = cache.size_per_core_bytes(threads)
        first_level = cache is machine.levels[0]
        fetched.append(
            _into_cache(chain, tiling, capacity, first_level, own_tasks, machine.vector_lanes, operand_bytes)
        )
    own = _external(chain, tiling, own_tasks, operand_bytes)
    return time_of(chain.flops, cycles, fetched, machine, threads, own.total * threads)


def _external(chain: Chain, tiling: ChainTiling, own_tasks: int, operand_bytes: int) -> Footprint:
    """What one thread's tasks read and write outside the chain, once each: halo rows of the input at every task."""
    first, last = chain.links[0], chain.links[-1]
    rows = chain.rows_for(tiling.rows)
    in_rows = min(first.in_height, (rows[0] - 1) * first.stride[0] + (first.kernel[0] - 1) * first.dilation[0] + 1)
    share = tiling.rows / (last.batch * last.out_height)
    return Footprint(
        own_tasks * (FP32_BYTES * in_rows * first.in_width * first.in_channels + share * operand_bytes),
        _weight_bytes(chain),
        own_tasks * FP32_BYTES * tiling.rows * last.out_width * last.out_channels,
    )


def _weight_bytes(chain: Chain) -> float:
    return FP32_BYTES * sum(link.out_channels * (link.group_in * link.taps + 1) for link in chain.links)


def _into_cache(
    chain: Chain,
    tiling: ChainTiling,
    capacity: float,
    first_level: bool,
    own_tasks: int,
    lanes: int,
    operand_bytes: int,
) -> Footprint:
    """Bytes that one thread moves into (or through) a cache of `capacity` bytes."""
    external = _external(chain, tiling, own_tasks, operand_bytes)
    rings = FP32_BYTES * sum(chain.ring_elements(tiling.step))
    if external.total + rings <= capacity:
        return Footprint(0.0, external.weights, 0.0)
    turns = own_tasks * ceil_div(tiling.rows, tiling.step)
    per_turn = (external.activations + external.results) / turns
    if per_turn + rings + external.weights <= capacity:
        return external
    activations = weights = results = 0.0
    for link, block, rows in zip(chain.links, tiling.links, _rows_per_turn(chain, tiling.step), strict=True):
        piece = _piece(link, rows)
        whole = replace(block, rows=rows)
        moved = nest_of(piece, whole, lanes, 1).into_cache(capacity, first_level=first_level)
        activations += turns * moved.activations
        weights += turns * moved.weights
        results += turns * moved.results
    return Footprint(
        max(activations, external.activations), max(weights, external.weights), max(results, external.results)
    )


def _rows_per_turn(chain: Chain, step: int) -> tuple[int, ...]:
    """Rows that each link computes in one turn, once the window is filled."""
    rows = [step]
    for before, link in zip(reversed(chain.links[:-1]), reversed(chain.links), strict=False):
        rows.insert(0, min(before.out_height, rows[0] * link.stride[0]))
    return tuple(rows)


def _piece(link: Convolution, rows: int) -> Convolution:
    """`rows` output rows of one image of `link`."""
    in_rows = (rows - 1) * link.stride[0] + (link.kernel[0] - 1) * link.dilation[0] + 1
    return replace(link, batch=1, out_height=rows, in_height=min(in_rows, link.in_height), padding=(0, link.padding[1]))
