"""Cost and tiling of chains: arithmetic and traffic of the links, over a moving window of rows.

One turn of the window makes `step` rows of the result: a piece of each link, one after the other. If the input rows,
ring buffers, weights and output rows of a turn fit a cache together, only the chain's input, weights and result pass
into it, once. If not, each link's piece moves what it would by itself, every turn, and what it finds at its start is
what the piece before it left: the rows of its input that this one has just written, if both fit the cache together. A
piece is a small stage of its own, whose weights serve all of its rows (`emit_rows` of the stages). No formula is
specific to a kind of link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Literal

from sepc.cost_model.cycles import compute_cycles
from sepc.cost_model.distant import with_fetches
from sepc.cost_model.latency import TASK_CYCLES, Cost, time_of
from sepc.cost_model.loops import Footprint, streamed_footprint
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import Choice, register_blocks, require_work
from sepc.cost_model.tiling import ChainTiling, LinkTiling
from sepc.cost_model.traffic import UNFORESEEN_STRIPS, Nest, missing_part, nest_of
from sepc.ir.arithmetic import ceil_div
from sepc.ir.stage import Chain, Map, Normalization, Stage

Objective = Literal["time", "memory"]
STEPS: Final = (1, 2, 4, 8)
LEAST_STEPS: Final = (1,)
"""Windows for the least scratch: the ring buffers hold what one row of results needs."""


@lru_cache(maxsize=4096)
def choose_chain(
    chain: Chain,
    machine: Machine,
    threads: int,
    *,
    epilogue_costs: tuple[int, ...],
    operand_bytes: int = 0,
    objective: Objective = "time",
) -> Choice:
    """The tiling of least predicted time for `chain`; for the objective "memory", among those with the least scratch.

    `epilogue_costs` has one entry per link; for the rest, and errors, see `sepc.cost_model.search.choose`.
    """
    for link in chain.links:
        require_work(link)
    blocks = tuple(_best_block(link, machine, cost) for link, cost in zip(chain.links, epilogue_costs, strict=True))
    height = chain.links[-1].out_height
    counts = sorted({1, *(threads * factor for factor in (1, 2, 3, 4))})
    rows = sorted({ceil_div(height, count) for count in counts if count <= height}, reverse=True)
    tilings = [ChainTiling(blocks, row, step) for row in rows for step in window_steps(row, objective)]
    costs = [predict_chain(chain, tiling, machine, threads, epilogue_costs, operand_bytes) for tiling in tilings]
    cost, tiling = min(zip(costs, tilings, strict=True), key=lambda one: one[0].time_us)
    return Choice(_with_fetches(chain, tiling, machine, threads, operand_bytes), cost)


def _with_fetches(chain: Chain, tiling: ChainTiling, machine: Machine, threads: int, operand_bytes: int) -> ChainTiling:
    """`tiling` with what its first link fetches of the chain's input, and its last one of the results."""
    last = len(chain.links) - 1
    links = [
        with_fetches(block, link, machine, threads, operand_bytes=operand_bytes, reads=index == 0, writes=index == last)
        for index, (link, block) in enumerate(zip(chain.links, tiling.links, strict=True))
    ]
    return replace(tiling, links=tuple(links))


def window_steps(rows: int, objective: Objective = "time") -> list[int]:
    """How many rows a turn may make of a task's `rows`: few, or all of them, whose weights are then read once."""
    return sorted({step for step in (LEAST_STEPS if objective == "memory" else (*STEPS, rows)) if step <= rows})


def _best_block(link: Stage, machine: Machine, epilogue_cost: int) -> LinkTiling:
    blocks = stage_blocks(link, machine)
    return min(blocks, key=lambda block: compute_cycles(link, block, machine, epilogue_cost))


def stage_blocks(link: Stage, machine: Machine) -> list[LinkTiling]:
    """The register blocks that `link` can have."""
    return [block for block in register_blocks(link, machine) if isinstance(block, LinkTiling)]


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
    own = _external(chain, tiling, own_tasks, operand_bytes)
    turn = _Turn.of(chain, tiling, machine)
    for cache in machine.levels[:-1]:
        moved = _into_cache(turn, turns, own, cache.size_per_core_bytes(threads), cache is machine.levels[0])
        if cache is not machine.last_cache and moved.weights == 0:
            # As for single stages: since their last use other layers' weights have passed through this cache.
            moved = moved._replace(weights=own.weights)
        fetched.append(moved)
    return time_of(chain.flops, cycles, fetched, machine, threads, own.total * threads)


def _external(chain: Chain, tiling: ChainTiling, own_tasks: int, operand_bytes: int) -> Footprint:
    """What one thread's tasks read and write outside the chain, once each.

    Tasks next to each other share the halo between them, as the second follows the first; a thread's first task, and
    the first of an image, have it to themselves.
    """
    first, last = chain.links[0], chain.links[-1]
    out_rows = min(own_tasks * tiling.rows, last.batch * last.out_height)
    images = ceil_div(out_rows, last.out_height)
    own_rows = chain.rows_for(ceil_div(out_rows, images))
    in_rows = min(first.in_height, (own_rows[0] - 1) * first.stride[0] + (first.kernel[0] - 1) * first.dilation[0] + 1)
    share = out_rows / (last.batch * last.out_height)
    # All that an elementwise link reads are operands.
    row = 0 if isinstance(first, Map) else first.in_width * first.in_channels
    return Footprint(
        first.element.size_bytes * images * in_rows * row,
        sum(streamed_footprint(link).weights for link in chain.links),
        last.element.size_bytes * out_rows * last.out_width * last.out_channels,
        share * operand_bytes,
    )


@dataclass(frozen=True)
class _Turn:
    """One turn of the window.

    Attributes:
        pieces: what each link does.
        reused: the part of the rows that each piece reads that were there before this turn.
        rings_bytes: of all ring buffers.
    """

    pieces: tuple[Nest, ...]
    reused: tuple[float, ...]
    rings_bytes: float

    @staticmethod
    def of(chain: Chain, tiling: ChainTiling, machine: Machine) -> _Turn:
        """The average turn of `chain` under `tiling`."""
        turns = ceil_div(tiling.rows, tiling.step)
        computed = tuple(ceil_div(rows, turns) for rows in chain.rows_for(tiling.rows))
        pieces, reused = [], []
        for index, (link, block, rows) in enumerate(zip(chain.links, tiling.links, computed, strict=True)):
            piece = _piece(link, rows)
            pieces.append(nest_of(piece, replace(block, rows=rows), machine.lanes(link.element), 1))
            new = computed[index - 1] if index else rows * link.stride[0]
            reused.append(1 - min(1.0, new / piece.in_height))
        return _Turn(tuple(pieces), tuple(reused), chain.ring_bytes(tiling.step))

    @property
    def touched(self) -> float:
        """Bytes that a turn touches."""
        first, last = self.pieces[0].footprints[0], self.pieces[-1].footprints[0]
        weights = sum(piece.footprints[0].weights for piece in self.pieces)
        return first.activations + weights + self.rings_bytes + last.results


def _into_cache(turn: _Turn, turns: int, external: Footprint, capacity: float, first_level: bool) -> Footprint:
    """Bytes that one thread moves into (or through) a cache of `capacity` bytes in `turns` turns."""
    if external.total + turn.rings_bytes <= capacity:
        return Footprint(0.0, 0.0, 0.0)
    activations = weights = results = read_strips = written_strips = 0.0
    rings_missing = missing_part(turn.touched / capacity)
    before = math.inf
    for index, (piece, reused) in enumerate(zip(turn.pieces, turn.reused, strict=True)):
        moved, touched = piece.into_cache(capacity, first_level=first_level), piece.footprints[0]
        missing = missing_part(turn.touched / capacity)
        old, new = reused * touched.activations, (1 - reused) * touched.activations
        if index:
            # The piece before has just written the new rows.
            again = missing * old + missing_part(max(before, touched.total) / capacity) * new
            activations += max(moved.activations, again)
        else:
            activations += max(moved.activations - new, missing * old)
        weights += max(moved.weights, missing * touched.weights)
        if index < len(turn.pieces) - 1:
            results += max(moved.results, rings_missing * touched.results)
        else:
            results += max(0.0, moved.results - touched.results)
        read_strips += moved.read_strips
        written_strips += moved.written_strips
        before = touched.total
    # As for single stages: the order of the chain's own input and results may be one that nobody foresees.
    first, last = turn.pieces[0].footprints[-1], turn.pieces[-1].footprints[-1]
    unforeseen_reads = UNFORESEEN_STRIPS * external.activations if first.read_strips else 0.0
    unforeseen_writes = UNFORESEEN_STRIPS * external.results if last.read_strips else 0.0
    return Footprint(
        external.activations + turns * activations,
        turns * weights,
        external.results + turns * results,
        external.operands,
        read_strips=max(turns * read_strips, unforeseen_reads),
        written_strips=max(turns * written_strips, unforeseen_writes),
    )


def _piece(link: Stage, rows: int) -> Stage:
    """`rows` output rows of one image of `link`."""
    if isinstance(link, Normalization | Map):
        return replace(link, extents=(1, rows, link.out_width, link.out_channels))
    in_rows = (rows - 1) * link.stride[0] + (link.kernel[0] - 1) * link.dilation[0] + 1
    return replace(link, batch=1, out_height=rows, in_height=min(in_rows, link.in_height), padding=(0, link.padding[1]))
