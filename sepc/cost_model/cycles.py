"""Cycles of a stage's arithmetic under a tiling, of all kinds of stages, and of products that alternate."""

from __future__ import annotations

import math
from typing import Final

from sepc.cost_model.blocks import BLOCK_CYCLES, REDUCTION_LOOP_CYCLES, dense_cycles, ends_cycles, lanewise_cycles
from sepc.cost_model.machine import Machine
from sepc.cost_model.tiling import DenseTiling, LaneTiling, ProductTiling, RowTiling, Tiling, WinogradTiling
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import Convolution
from sepc.ir.stage import Map, Normalization, Pooling, Softmax, Stage
from sepc.ir.winograd import operations, transforms

SLOT_INSTRUCTIONS: Final = 3.5
"""What one of the seven products of Strassen's algorithm takes beside multiply-adds, per vector of a block: together
three stores (each as long as two additions), four additions of intermediate results, four of the bias, their loads."""
SLOT_INSTRUCTIONS_BY_PRODUCT: Final = 5.0
"""The same where every product starts from memory and ends there."""
QUARTERS_READ: Final = 3
"""Products of Strassen's algorithm whose left factor is a quarter of the input; those of the others are sums."""
SPILLS_PER_INPUT: Final = 2.2
"""How many times each input of a tile with more of them than there are registers is stored and loaded beside once.

LLVM's models of a Cortex-A72 and a Neoverse N1: 6×6 inputs take 287 and 199 cycles, their 144 multiply-adds 144 and 72.
"""
SOFTMAX_INSTRUCTIONS: Final = 20
"""Instructions of a softmax per vector that take time: of some 26, most in two exponentials (rows of 49 to 1000)."""


def compute_cycles(stage: Stage, tiling: Tiling, machine: Machine, epilogue_cost: int = 0) -> float:
    """Cycles of one core for all arithmetic of `stage`, its data in the first-level cache."""
    match stage, tiling:
        case Convolution(), DenseTiling():
            return dense_cycles(stage, tiling.block, machine, epilogue_cost)
        case Convolution(), ProductTiling():
            return _products_cycles(tiling.product_of(stage), tiling, machine, epilogue_cost)
        case Convolution(), LaneTiling():
            return lanewise_cycles(stage, tiling.columns, tiling.vectors, machine, epilogue_cost)
        case Pooling(), LaneTiling():
            return _pooling_cycles(stage, tiling, machine, epilogue_cost)
        case Normalization(), RowTiling():
            return _normalization_cycles(stage, machine, epilogue_cost)
        case Map(), RowTiling():
            return _map_cycles(stage, machine, epilogue_cost)
    raise TypeError(f"{type(stage).__name__} cannot be tiled by {type(tiling).__name__}")


def _products_cycles(product: Convolution, tiling: ProductTiling, machine: Machine, epilogue_cost: int) -> float:
    """All products, and what comes before and after."""
    if isinstance(tiling, WinogradTiling):
        return _winograd_cycles(product, tiling, machine, epilogue_cost)
    return _strassen_cycles(product, tiling, machine, epilogue_cost)


def _strassen_cycles(half: Convolution, tiling: ProductTiling, machine: Machine, epilogue_cost: int) -> float:
    """Seven products, whose blocks are started from and added to results that are kept; four sums of the input."""
    product = tiling.product
    own = SLOT_INSTRUCTIONS_BY_PRODUCT if tiling.by_product else SLOT_INSTRUCTIONS
    cost = own + epilogue_cost * 4 / 7
    products = (7 - QUARTERS_READ) * dense_cycles(half, product.block, machine, cost)
    # A quarter's pixels are as far apart as those of the whole, and conflict in the first-level cache like these.
    products += QUARTERS_READ * dense_cycles(half, product.block, machine, cost, 2 * half.in_channels)
    vectors = half.pixels * len(split_lanes(half.in_channels, machine.lanes(half.element)))
    passes = ceil_div(ceil_div(half.out_channels, sum(product.panel)), product.panels)
    sums = vectors * passes * (4 / machine.stores_per_cycle + 4 / machine.loads_per_cycle)
    return products + sums


def _winograd_cycles(product: Convolution, tiling: WinogradTiling, machine: Machine, epilogue_cost: int) -> float:
    """A product for each position of a tile, and the transforms of inputs and of products."""
    block, matrices = tiling.product, transforms(tiling.outputs)
    products = tiling.count * dense_cycles(product, block.block, machine, 0)
    passes = ceil_div(ceil_div(product.out_channels, sum(block.panel)), block.panels)
    moved = tiling.count / machine.loads_per_cycle, tiling.count / machine.stores_per_cycle
    inputs = operations(matrices.inputs) / machine.fma_per_cycle + sum(moved)
    if tiling.count > machine.vector_registers and not machine.has_memory_operands:
        inputs += SPILLS_PER_INPUT * sum(moved)
    results = tiling.outputs**2 * (epilogue_cost / machine.fma_per_cycle + 1 / machine.stores_per_cycle)
    outputs = operations(matrices.outputs) / machine.fma_per_cycle + moved[0] + results
    lanes = machine.lanes(product.element)
    in_vectors = len(split_lanes(product.in_channels, lanes)) * passes
    out_vectors = len(split_lanes(product.out_channels, lanes))
    return products + product.out_width * (in_vectors * inputs + out_vectors * outputs)


def _pooling_cycles(pool: Pooling, tiling: LaneTiling, machine: Machine, epilogue_cost: int) -> float:
    """Cycles of a pooling: one load and one operation per vector and window position, chained through the window."""
    lanes = machine.lanes(pool.element)
    # Averages are summed up in float32: of narrower numbers, in several vectors, to which they are converted.
    wide = 1 if pool.maximum else pool.element.per_float32
    added = (3 if pool.maximum else 1) * wide + (wide if wide > 1 else 0)
    full, rest = divmod(pool.channels, lanes * tiling.vectors)
    window_rows, window_columns = pool.window
    outputs = pool.images * pool.out_height * pool.out_width

    def group_cycles(vectors: int) -> float:
        # A maximum takes two instructions, one of them to keep NaNs.
        chain = machine.fma_latency_cycles * (2 if pool.maximum else 1)
        position = max(vectors / machine.loads_per_cycle, added * vectors / machine.fma_per_cycle, chain)
        window = window_rows * pool.window_planes * (window_columns * position + REDUCTION_LOOP_CYCLES)
        return window + ends_cycles(vectors, machine, epilogue_cost + 1, math.inf)

    cycles = full * group_cycles(tiling.vectors)
    if rest:
        cycles += group_cycles(len(split_lanes(rest, lanes)))
    return outputs * cycles


def _normalization_cycles(norm: Normalization, machine: Machine, epilogue_cost: int) -> float:
    """Three passes over a row: sum, squared distances, result; without a mean, or of a softmax, as they are.

    Horizontal sums, root and division overlap with the rows beside: on a Zen 5 core rows of 33 to 768 channels took 0.8
    to 1.15 times as long as this says (0.1 to 0.8 times, when those counted).
    """
    vectors, wide = len(split_lanes(norm.channels, machine.lanes(norm.element))), norm.element.per_float32
    passes, instructions = (3, 6) if norm.subtract_mean else (2, 3)
    if isinstance(norm, Softmax):
        instructions = SOFTMAX_INSTRUCTIONS
    instructions *= wide  # All of it is in float32.
    if wide > 1:
        instructions += passes * wide  # conversions
    per_vector = (
        passes / machine.loads_per_cycle
        + (instructions + epilogue_cost) / machine.fma_per_cycle
        + 1 / machine.stores_per_cycle
    )
    return norm.pixels * (vectors * per_vector + 2 * (passes - 1) * BLOCK_CYCLES)


def _map_cycles(mapping: Map, machine: Machine, epilogue_cost: int) -> float:
    """Operations, one load and one store per vector; rows that are no multiple of a vector end in narrower ones."""
    rows = 1
    for extent in mapping.extents[:-1]:
        rows *= extent
    vectors = len(split_lanes(mapping.extents[-1], machine.lanes(mapping.element))) if mapping.extents else 1
    # Its operators are all its own; as an epilogue they are the same ones.
    operations = max(mapping.operations, epilogue_cost) / machine.fma_per_cycle
    per_vector = max(operations, 1 / machine.loads_per_cycle, 1 / machine.stores_per_cycle)
    return rows * (vectors * per_vector + BLOCK_CYCLES)
