"""The choice of a tiling: enumerate what is legal, prune by the cost of arithmetic, choose by predicted time.

Two stages keep it quick: first the register block, by arithmetic alone, as task sizes hardly change it; then, for the
few best blocks, how much one task does, by the bytes it moves and by how evenly the threads are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Final

from sepc.cost_model.blocks import is_tight
from sepc.cost_model.cycles import compute_cycles
from sepc.cost_model.distant import with_fetches
from sepc.cost_model.latency import Cost, predict
from sepc.cost_model.machine import Machine
from sepc.cost_model.tiling import (
    DenseTiling,
    LaneTiling,
    Narrow,
    ProductTiling,
    RegisterBlock,
    RowTiling,
    StrassenTiling,
    Tiling,
    WinogradTiling,
)
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import Convolution, Mixing
from sepc.ir.stage import Map, Normalization, Pooling, Stage
from sepc.ir.winograd import POINTS

__all__ = ["Choice", "Cost", "candidates", "choose", "predict"]

PANEL_VECTORS: Final = {True: (1, 2, 3, 4), False: (1, 2, 3, 4, 8)}
"""Where multiply-adds take operands from memory, and where they do not. Of a single row, 8 vectors hide the latency of
multiply-adds (1280→1000, Neoverse N1 by LLVM's model: 91 % of their bound; 7 vectors 87 %, 4 vectors 50 %). With
operands from memory, vectors being wide, more than 4 were not tried.
"""
MOST_LANEWISE_VECTORS: Final = 4
REGISTER_BLOCKS_KEPT: Final = 3
"""Register blocks that reach the second stage."""
SLACK_OF_REGISTER_BLOCKS: Final = 1.15
"""Blocks whose arithmetic takes longer than this times the quickest's are dropped at once."""
LEAST_GAIN_BY_BYTES: Final = 1.1
"""How many times as long the blocks of quickest arithmetic have to take, bytes included, for another to be tried.

(27×27 depthwise on 32² keeps 4 columns by arithmetic, which takes 800 µs; 16 columns read a third as much: 514 µs.)
"""


LEAST_HALF_PIXELS: Final = 64
"""Products of halves of fewer pixels are not considered. Their weights, 7/4 of the plain product's, are read too few
times: with 25 of the 49 pixels of a 7² map, 512→1024, 1024→1024 and 1024→512 took 0.94 to 1.06 times the plain
product's time within MobileNet V1 and RepViT, and up to 1.5 times for some blocks, where 0.93 was predicted.
"""


LEAST_GAIN: Final = 1.04
"""How many times as long the plain product has to take by prediction, for the scratch and the rounding errors of
products of halves. MobileNetV2 got 13 such layers without it, and was no quicker (1.003).
"""


@dataclass(frozen=True)
class Choice:
    """The tiling chosen for a stage, its predicted cost, and the best by each of the `others` of its algorithms."""

    tiling: Tiling
    cost: Cost
    others: tuple[Choice, ...] = ()

    def __str__(self) -> str:
        """As the printed graph has it."""
        return f"{self.tiling}, predicted {self.cost.time_us:.1f} µs, bound by {self.cost.bottleneck}"


@lru_cache(maxsize=4096)
def choose(
    stage: Stage,
    machine: Machine,
    threads: int,
    *,
    epilogue_cost: int = 0,
    operand_bytes: int = 0,
    mixing: Mixing = "pixels",
) -> Choice:
    """The tiling of least predicted time for `stage` on `threads` threads of `machine`.

    Args:
        stage: the problem.
        machine: the machine.
        threads: threads, each on a core of its own.
        epilogue_cost: vector instructions per vector of results that follow the stage.
        operand_bytes: bytes of the tensors that these read.
        mixing: which fast algorithms may be used, by what they mix; they also take scratch.

    Raises ValueError for a stage without any work, such as one of a batch of 0, which has no tiling.
    """
    require_work(stage)
    predicted = partial(predict, stage, epilogue_cost=epilogue_cost, operand_bytes=operand_bytes)
    choices = [
        Choice(tiling, predicted(tiling, machine, threads))
        for blocks in _kinds_of_blocks(stage, machine, mixing)
        for block in _promising(stage, blocks, machine, epilogue_cost, lambda block: predicted(block, machine, threads))
        for tiling in task_sizes(stage, block, machine, threads)
    ]
    chosen = min(choices, key=lambda one: one.cost.time_us * (1.0 if _is_plain(one.tiling) else LEAST_GAIN))
    fetches = partial(with_fetches, stage=stage, machine=machine, threads=threads, operand_bytes=operand_bytes)
    others = tuple(replace(one, tiling=fetches(one.tiling)) for one in _best_of_others(chosen, choices))
    return replace(chosen, tiling=fetches(chosen.tiling), others=others)


def _best_of_others(chosen: Choice, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The quickest of `choices` by each algorithm that is not the chosen one's."""
    best: dict[type, Choice] = {}
    for one in sorted(choices, key=lambda one: one.cost.time_us):
        if type(one.tiling) is not type(chosen.tiling):
            best.setdefault(type(one.tiling), one)
    return tuple(best.values())


def _is_plain(tiling: Tiling) -> bool:
    return not isinstance(tiling, ProductTiling)


def _promising(
    stage: Stage, blocks: Sequence[Tiling], machine: Machine, epilogue_cost: int, predicted: Callable[[Tiling], Cost]
) -> list[Tiling]:
    """The few of `blocks` whose arithmetic is quickest, and the one whose bytes make it by far the quickest, if any."""
    cycles = [compute_cycles(stage, block, machine, epilogue_cost) for block in blocks]
    limit = min(cycles, default=0.0) * SLACK_OF_REGISTER_BLOCKS
    ordered = [blocks[index] for c, index in sorted((c, index) for index, c in enumerate(cycles)) if c <= limit]
    few, others = ordered[:REGISTER_BLOCKS_KEPT], ordered[REGISTER_BLOCKS_KEPT:]
    if others:
        best = min(others, key=lambda block: predicted(block).time_us)
        if predicted(best).time_us * LEAST_GAIN_BY_BYTES < min(predicted(block).time_us for block in few):
            few.append(best)
    return few


def require_work(stage: Stage) -> None:
    """Raise ValueError if `stage` computes nothing."""
    if stage.flops == 0:
        raise ValueError(f"{stage} computes nothing: no batch, map or channel may be 0")


def candidates(stage: Stage, machine: Machine, threads: int, *, mixing: Mixing = "pixels") -> list[Tiling]:
    """All tilings that are considered for `stage`: every block with every task size; `mixing` as for `choose`."""
    blocks = [block for kind in _kinds_of_blocks(stage, machine, mixing) for block in kind]
    return [tiling for block in blocks for tiling in task_sizes(stage, block, machine, threads)]


def _kinds_of_blocks(stage: Stage, machine: Machine, mixing: Mixing) -> list[list[Tiling]]:
    """The register blocks, apart where arithmetic alone does not tell which are better."""
    kinds = [register_blocks(stage, machine)]
    if not isinstance(stage, Convolution):
        return kinds
    if mixing == "pixels" and stage.halves is not None and stage.halves.out_width >= LEAST_HALF_PIXELS:
        blocks = product_blocks(stage.halves, machine)
        kinds += [[StrassenTiling(block, by_product) for block in blocks] for by_product in (False, True)]
    for outputs in POINTS if mixing != "nothing" else ():
        product = stage.winograd_product(outputs)
        blocks = product_blocks(product, machine) if product is not None else []
        kinds += [[WinogradTiling(block, by_product, outputs) for block in blocks] for by_product in (False, True)]
    return kinds


def register_blocks(stage: Stage, machine: Machine) -> list[Tiling]:
    """Tilings that differ in what is held in registers; each has the largest tasks."""
    lanes = machine.lanes(stage.element)
    match stage:
        case Convolution() if stage.lanewise(lanes):
            return list(_lanewise_blocks(stage, machine))
        case Convolution():
            return list(_dense_blocks(stage, machine, _narrow(stage, machine)))
        case Pooling():
            most = min(MOST_LANEWISE_VECTORS, max(1, ceil_div(stage.channels, lanes)))
            return [
                LaneTiling(1, vectors, max(1, stage.out_height), ceil_div(stage.channels, lanes * vectors))
                for vectors in range(1, most + 1)
            ]
        case Normalization() | Map():
            return [RowTiling(_outer_rows(stage, lanes))]


def product_blocks(product: Convolution, machine: Machine) -> list[DenseTiling]:
    """Blocks of one of the matrix products that a convolution is made of; each has the largest tasks.

    None where fewer channels than a vector has lanes are all that sums and transforms work on.
    """
    if min(product.in_channels, product.out_channels) < machine.lanes(product.element):
        return []
    narrow = _narrow(product, machine)
    blocks = _dense_blocks(product, machine, "alone" if narrow == "in pairs" else narrow)
    return [block for block in blocks if not is_tight(block, machine)]


def _narrow(conv: Convolution, machine: Machine) -> Narrow:
    """How registers hold vectors that are narrower than the others of a panel."""
    lanes = machine.lanes(conv.element)
    if conv.group_out % lanes == 0:
        return "alone"
    if machine.selects_per_cycle > 0:
        return "in pairs"
    # Machines with memory operands broadcast from memory, for any width. Others copy.
    copies = not machine.has_memory_operands
    return "widened" if copies and machine.fma_per_cycle == machine.half_width_fma_per_cycle else "alone"


def _dense_blocks(conv: Convolution, machine: Machine, narrow: Narrow) -> Iterator[DenseTiling]:
    lanes = machine.lanes(conv.element)
    counts = PANEL_VECTORS[machine.has_memory_operands]
    panels = [(lanes,) * count for count in counts if lanes * count <= conv.group_out]
    if conv.group_out < lanes * max(counts):
        exact = split_lanes(conv.group_out, lanes)
        if exact not in panels:
            panels.append(exact)
    for panel in panels:
        panel_count = ceil_div(conv.group_out, sum(panel))
        for columns in range(1, max(1, conv.out_width) + 1):
            if RegisterBlock(columns, panel, narrow).registers > machine.vector_registers:
                break
            repeat = max(segment.repeat for segment in conv.column_segments(columns))
            block = DenseTiling(columns, panel, max(1, conv.out_height), repeat, panel_count, narrow)
            yield block
            # Where multiply-adds take an element of a register anyway, that may come with its neighbours. Of several
            # columns registers run out: LLVM unrolls short loops, and loads the inputs of all steps first. And of one,
            # the widest panel has the fewest loads for a multiply-add.
            by_element = not machine.has_memory_operands and conv.group_in >= lanes
            if by_element and columns == 1 and sum(panel) == max(map(sum, panels)):
                yield replace(block, step_channels=lanes)


def _lanewise_blocks(conv: Convolution, machine: Machine) -> Iterator[Tiling]:
    lanes = machine.lanes(conv.element)
    for vectors in range(1, min(MOST_LANEWISE_VECTORS, max(1, ceil_div(conv.out_channels, lanes))) + 1):
        # Accumulators, and at least one weight and one input.
        most_columns = (machine.vector_registers - 2) // vectors
        line_vectors = machine.levels[0].line_bytes // (lanes * conv.element.size_bytes)
        for turns in {1, max(1, line_vectors // vectors)}:
            groups = ceil_div(conv.out_channels, lanes * vectors * turns)
            for columns in range(1, min(most_columns, max(1, conv.out_width)) + 1):
                yield LaneTiling(columns, vectors, max(1, conv.out_height), groups, turns=turns)


def task_sizes(stage: Stage, block: Tiling, machine: Machine, threads: int) -> Iterator[Tiling]:
    """`block` with tasks of various sizes: each axis in a growing number of even parts."""
    match block:
        case ProductTiling():
            for product in _dense_task_sizes(block.product, threads):
                yield replace(block, product=product)
        case DenseTiling():
            yield from _dense_task_sizes(block, threads)
        case LaneTiling():
            for rows in _even_parts(block.rows, threads):
                for groups in _even_parts(block.groups, threads):
                    for blocks in _column_parts(stage, block, threads):
                        yield replace(block, rows=rows, groups=groups, blocks=blocks)
        case RowTiling():
            for rows in _even_parts(block.rows, threads):
                yield RowTiling(rows)


def _column_parts(stage: Stage, block: LaneTiling, threads: int) -> Iterable[int | None]:
    """Column blocks per task: of a convolution of one long row, parts of it; else None, as rows are cut instead."""
    if not isinstance(stage, Convolution) or stage.out_height > 1:
        return (None,)
    repeat = max(segment.repeat for segment in stage.column_segments(block.columns))
    return (None if part == repeat else part for part in _even_parts(max(1, repeat), threads))


def _dense_task_sizes(block: DenseTiling, threads: int) -> Iterator[DenseTiling]:
    for panels in _even_parts(block.panels, threads):
        for rows in _even_parts(block.rows, threads):
            # Rows are cut before columns are: part of a row only where a task has but one.
            parts = _even_parts(block.blocks, threads) if rows == 1 else (block.blocks,)
            for blocks in parts:
                yield replace(block, rows=rows, blocks=blocks, panels=panels)


def _even_parts(extent: int, threads: int) -> Iterable[int]:
    """Sizes of the parts if `extent` is cut into 1, 2, 4, 8, 32, 128, … parts, and into multiples of `threads`; no
    repetition.
    """
    counts = {1, extent}
    count = 2
    while count < extent:
        counts.add(count)
        count *= 2 if count < 8 else 4
    if threads > 1:
        counts |= {threads * factor for factor in (1, 2, 3, 4) if threads * factor <= extent}
    return sorted({ceil_div(extent, count) for count in counts}, reverse=True)


def _outer_rows(stage: Normalization | Map, lanes: int) -> int:
    """Elements of the axis that a row tiling splits."""
    match stage:
        case Normalization():
            return max(1, stage.pixels)
        case Map():
            if len(stage.extents) == 1:
                return max(1, stage.extents[0] // (2 * lanes))
            return max(1, stage.extents[-2]) if stage.extents else 1
