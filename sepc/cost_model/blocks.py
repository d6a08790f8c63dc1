"""Cycles of dense and lanewise convolutions in register blocks, on one core, their data in the first-level cache.

Multiply-adds and loads, and in dense blocks the latency of the accumulators' chains, bound each innermost iteration
from below; the slowest bound counts. Blocks and kernel-row loops add what setting them up costs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Final

from sepc.cost_model.loops import set_lines
from sepc.cost_model.machine import Machine
from sepc.cost_model.tiling import DenseTiling, RegisterBlock, unrolled_taps
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.convolution import ColumnSegment, Convolution
from sepc.ir.element import Element
from sepc.ir.stage import Stage

# Empirical constants, from about 580 kernels timed on one shared Zen 5 host (37 layers of MobileNet V1 and V2,
# EfficientNet-Lite0, ResNet-50, ConvNeXt; 10 to 14 random tilings each). A random search minimised the spread of
# log(predicted / measured) and the regret, for dense and lanewise kernels apart; the values here lie between the two
# results, rounded by hand. They are no properties of the core: the results differ as the comments say.
BLOCK_CYCLES: Final = 3.5
"""Entering and leaving one register block (fits: dense 2.7, lanewise 0.7; see `CHAIN_CYCLES` for the value here)."""
CHAIN_CYCLES: Final = 1.0
"""What a chain of dependent multiply-adds takes per link beyond their latency.

With it and `BLOCK_CYCLES` the mean regret of the register block over 17 pointwise layers, 27 blocks each, weights not
in the caches, fell from 6.6 to 1.0 %: blocks of just as many accumulators as hide the latency are slower than seems.
(That was with 0.5. With 1.0 these layers are chosen alike, and 384→1536 with GELU on 3136 pixels no longer gets 9
accumulators, which take 19.0 ms, where 16 take 16.5 ms.)
"""
REORDER_WINDOW: Final = 500.0
"""Multiply-adds among which a block's end overlaps with the next one's start (fits: dense 525, lanewise 1330)."""
EPILOGUE_EXPOSED: Final = 3.0
"""Part of the epilogue's instructions, at least, that take time of their own, as they compete with the multiply-adds:
so many times the part of all instructions that multiply-adds can be.

That makes three quarters on Zen 5, and half on Zen 4, which does half as many multiply-adds in as many instructions. 35
regions of MobileNet V1 to V3, EfficientNet-B0 and ConvNeXt on Zen 5: without it, the 90th percentile of error was
29 %, blocks with SiLU being predicted up to 40 % too fast; with it 10 %, with all of the epilogue exposed 11 %.
On cores without units for anything but multiply-adds nothing of it overlaps: measured on Sapphire Rapids, where a
maximum, a sum or a blend among multiply-adds takes the place of one; products of halves are then chosen less often
(96→576 on 14²: 117 µs by seven products, 94 by eight).
"""
REDUCTION_LOOP_CYCLES: Final = 1.0
"""Entering and leaving the innermost loop over input channels, per tap (fit: dense 0.2)."""
LOOP_INSTRUCTIONS: Final = {True: 3, False: 6}
"""Instructions of one trip of the innermost loop beside multiply-adds and loads: counting, addresses, prefetching.

Where operands may come from memory, with addresses of several parts, and where not (LLVM 22's code for Arm).
"""
BLOCK_SUM_INSTRUCTIONS: Final = 9
"""Instructions per vector that adding a block of products in float16 to a sum in float32 takes: two conversions, two
loads, additions and stores, and clearing the vector (LLVM 22's code for Arm)."""
CONFLICT_TRANSFERS: Final = 2.0
"""How many times as long as a line from the second level takes one that was evicted for others of its set.

1024→1024 channels on 49 pixels on Zen 4, whose first level has eight lines per set: blocks of one vector take 1.0 times
their multiply-adds' time with 5 columns, 1.1 (11), 1.4 (12), 3.2 (22) and 4.2 (25). With this they are predicted to
take 1.0, 1.7, 1.9, 3.1 and 3.3 times as long; blocks of 12×2 vectors 1.0 (measured 1.1).
"""
KERNEL_ROW_CYCLES: Final = 2.5
"""One trip of a loop over kernel rows (fits: dense 2.1, lanewise 2.5)."""
# Registers: what LLVM 22 makes of some loops; measured on the single shapes named, and not on other machines.
SPILL_FACTOR: Final = 2.3
"""How much slower a block runs whose registers do not suffice (960→320 on 49 pixels: 9×3 vectors 2.3, 6×4 2.5)."""
UNROLLED_CHANNELS: Final = 8
"""Loops over at most so many input channels count as unrolled, several taps then sharing inputs in registers. Only 3
channels were measured (slow) and 16 and more (not slow); the border between is a guess."""
UNROLLED_INSTRUCTIONS: Final = 300
"""The same on Arm: loops that have fewer instructions than that when they are unrolled, LLVM's own limit. Of 10
channels, blocks of 6×2 vectors are (240, 269 accesses to the stack), those of 8×2 are not (300, none)."""
UNROLLED_OVERHEAD: Final = 4
"""Instructions of the loop itself, of these."""
SHARED_INPUTS: Final = {True: (20, 0.026), False: (6, 0.11)}
"""How many pairs of a column and a tap shared with its neighbour are free in such a loop, and by how much it slows down
for each one more; where multiply-adds take operands from memory, and where they do not.

Without them (Arm; LLVM's model of a Cortex-A72, 3×3 with stride 2 in two vectors): 6 columns nothing is spilled, 8
columns 1.25 times the multiply-adds' time, 12 columns 1.6.

This and the next two follow the timings of some 25 blocks of two stems (3×3 and 7×7, stride 2, 3 input channels), to
which they were fitted by hand: 7×7 with 3 to 5 columns 1.0 to 1.2 times the quickest, 9 columns 1.7, 14 columns 2.4.
"""
UNSHARED_COLUMNS: Final = (5, 0.14)
"""The same on Arm where taps share no inputs: columns that are free, and the slowdown for each one more. LLVM loads the
inputs of several taps ahead, and keeps them on the stack: a Neoverse N1, 4×4 with stride 4 of 3 channels, takes 1.0
times the multiply-adds' time with 5×3 and 5×4 vectors, 1.13 with 6×4, 1.4 with 8×3 (float16: 1.5)."""
UNSHARED_VECTORS: Final = (3, 0.6)
"""The vectors of a panel that hide this, and the slowdown for each that lacks: 1.3 to 1.6 with 4×2, 2.1 with 12×2."""
SPARE_REGISTERS: Final = 5
SPARE_REGISTER_FACTOR: Final = 0.05
"""Slowdown of such a loop per register that it lacks beside the spare ones (3×3: 13×2 vectors 1.2, 14×2 1.3)."""
SPARE_LANEWISE_REGISTERS: Final = 2
"""Registers that lanewise blocks need besides: 7×4 and 14×2 vectors (3×3, 32 registers) were seen to access the stack,
and took 0 to 25 % longer than 14×1, which did not.
"""
SPARE_LANEWISE_REGISTERS_FOR_LOADS: Final = 5
"""The same where multiply-adds take no operands from memory, so that inputs are loaded well before they are used.

LLVM's code for Arm, blocks of one vector: 7×7 19 columns nothing on the stack, 20 columns 40 accesses; 3×3 24 columns
nothing, with stride 2 14 columns nothing, 19 columns 41.
"""
UNROLLED_BLOCKS: Final = 2
"""Loops over at most so many column blocks, of more in the row, make tight blocks spill (see `TIGHT_REGISTERS`)."""
TIGHT_REGISTERS: Final = 3
"""Such blocks spill if fewer than so many registers are spare: 9×3 vectors in tasks of 1 block (54 vector accesses to
the stack per inner iteration, none in tasks of 5), 6×4 in tasks of 2. (13×2 in tasks of 1 was not slower, but counts.)
On machines whose multiply-adds take no operands from memory all such blocks do, as several inputs are loaded ahead:
LLVM's code for a Neoverse N1, 14×2 and 9×3 vectors 6 accesses and 2.6 times the multiply-adds' time, 13×2 none.
"""


def tap_uses(conv: Convolution, axis: int) -> int:
    """Pairs of an output position and a kernel tap along `axis` (0 rows, 1 columns) that fall inside the input."""
    outputs = (conv.out_height, conv.out_width)[axis]
    available = (conv.in_height, conv.in_width)[axis]
    uses = 0
    for tap in range(conv.kernel[axis]):
        offset = tap * conv.dilation[axis] - conv.padding[axis]
        first = max(0, ceil_div(-offset, conv.stride[axis]))
        end = min(outputs, ceil_div(available - offset, conv.stride[axis]))
        uses += max(0, end - first)
    return uses


def _row_uses(conv: Convolution) -> float:
    """Pairs of an output row of one image and a row of the kernel that fall inside the input, on average."""
    planes = conv.depth.uses / conv.depth.out_planes if conv.depth else 1.0
    return tap_uses(conv, 0) * planes


@lru_cache(maxsize=4096)
def _segments(conv: Convolution, columns: int) -> tuple[tuple[ColumnSegment, tuple[int, ...], int], ...]:
    """The blocks of a row: segment, columns that each valid tap serves, and distinct input columns read."""
    segments = []
    for segment in conv.column_segments(columns):
        if segment.interior:
            valid = (segment.columns,) * conv.kernel[1]
        else:
            covered = range(segment.start, segment.start + segment.columns)
            counts = [sum(conv.column_valid(column, tap) for column in covered) for tap in range(conv.kernel[1])]
            valid = tuple(count for count in counts if count)
        apart = min(conv.stride[1], conv.kernel[1]) if conv.dilation[1] == 1 else conv.kernel[1]
        distinct = min(sum(valid), (segment.columns - 1) * apart + len(valid))
        segments.append((segment, valid, distinct))
    return tuple(segments)


@lru_cache(maxsize=4096)
def dense_cycles(
    conv: Convolution, block: RegisterBlock, machine: Machine, epilogue_cost: float, pixel_channels: int | None = None
) -> float:
    """Cycles of a dense convolution in blocks of that kind, all panels, rows and images.

    `pixel_channels` says how many channels apart its input's pixels are, where these are more than it reads.
    """
    apart = conv.stride[1] * (pixel_channels or conv.in_channels)
    full, rest = divmod(conv.group_out, sum(block.panel))
    cycles = full * _dense_panel_cycles(conv, block, machine, epilogue_cost, apart) if full else 0.0
    if rest:
        tail = replace(block, panel=split_lanes(rest, max(block.panel)))
        cycles += _dense_panel_cycles(conv, tail, machine, epilogue_cost, apart)
    return cycles * conv.images * conv.groups


def _dense_panel_cycles(
    conv: Convolution, block: RegisterBlock, machine: Machine, epilogue_cost: float, apart: int
) -> float:
    """Cycles of all blocks of one panel, whose columns' inputs are so many channels `apart`."""
    cache_lines = set_lines(apart, machine.levels[0].size_bytes, conv.element)
    row_uses, total = _row_uses(conv), 0.0
    sums = sum(runs for _, runs, _ in conv.row_sums) if conv.sums_in_blocks else 0
    for segment, valid, _ in _segments(conv, block.columns):
        per_tap_row, multiplies = 0.0, 0.0
        for valid_columns in valid:
            used = replace(block, columns=valid_columns)
            evicted = max(0, valid_columns - cache_lines)
            iteration = _dense_iteration_cycles(used, machine, conv.element, evicted)
            per_tap_row += conv.group_in * iteration + REDUCTION_LOOP_CYCLES
            multiplies += conv.group_in * used.accumulators
        own = replace(block, columns=segment.columns)
        per_tap_row *= _spill_factor(conv, own, machine)
        per_tap_row += sums * own.vectors * BLOCK_SUM_INSTRUCTIONS / machine.instructions_per_cycle
        if conv.kernel_rows > 1:
            per_tap_row += KERNEL_ROW_CYCLES
        ends = ends_cycles(own.vectors, machine, epilogue_cost, multiplies * conv.kernel_rows)
        total += segment.repeat * (row_uses * per_tap_row + conv.out_height * ends)
    return total


def _spill_factor(conv: Convolution, block: RegisterBlock, machine: Machine) -> float:
    """How much slower a block runs whose registers do not suffice for accumulators, weights and inputs."""
    columns, registers = block.columns, block.registers
    spare = 0 if machine.has_memory_operands else TIGHT_REGISTERS
    if registers + spare > machine.vector_registers:
        return SPILL_FACTOR
    overlap = conv.kernel[1] - conv.stride[1]  # taps that an input column shares with the neighbouring output's
    free, factor = SHARED_INPUTS[machine.has_memory_operands]
    if columns == 1 or conv.kernel[1] == 1 or not _unrolls(conv, block, machine):
        return 1.0
    if overlap <= 0:
        return 1.0 if machine.has_memory_operands else _unshared_factor(columns, len(block.panel))
    lacking = max(0, registers + SPARE_REGISTERS - machine.vector_registers)
    shared = max(0, columns * overlap - free)
    return 1 + SPARE_REGISTER_FACTOR * lacking + factor * shared


def _unshared_factor(columns: int, panel_vectors: int) -> float:
    few, column_factor = UNSHARED_COLUMNS
    several, vector_factor = UNSHARED_VECTORS
    return 1 + column_factor * max(0, columns - few) + vector_factor * max(0, several - panel_vectors)


def _unrolls(conv: Convolution, block: RegisterBlock, machine: Machine) -> bool:
    """Whether the loop over the input channels of a block counts as unrolled."""
    if machine.has_memory_operands:
        return conv.group_in <= UNROLLED_CHANNELS
    instructions = block.accumulators + block.columns + len(block.panel) + UNROLLED_OVERHEAD
    return conv.group_in * instructions < UNROLLED_INSTRUCTIONS


@lru_cache(maxsize=4096)
def _dense_iteration_cycles(block: RegisterBlock, machine: Machine, element: Element, evicted_lines: int) -> float:
    """One input channel: a vector of weights per panel vector, an input value per column, broadcast or by element.

    So many of the columns' lines come from the second-level cache, as the first one cannot keep them until their next
    channel is read: pixels of a power of two of bytes begin in the same few of its sets, with 1024 channels of float32
    all in one.
    """
    columns, panel = block.columns, block.panel
    groups = [(lanes, group) for lanes in panel for group in block.column_groups(lanes)]
    multiplies = sum(1 / machine.fma_per_cycle_at(lanes * len(group), element) for lanes, group in groups)
    loads = sum(1 / machine.loads_per_cycle_at(lanes, element) for lanes in panel)
    inputs = columns / block.step_channels
    loads += inputs / machine.half_width_loads_per_cycle
    second = machine.levels[1]
    evicted_bytes = evicted_lines / block.step_channels * second.line_bytes
    loads += CONFLICT_TRANSFERS * evicted_bytes / second.bandwidth_bytes_per_cycle
    selects = block.vectors - len(groups)
    looping = LOOP_INSTRUCTIONS[machine.has_memory_operands] / block.step_channels
    instructions = len(groups) + selects + inputs + len(panel) + looping
    if machine.selects_per_cycle > 0:
        selecting = selects / machine.selects_per_cycle
    else:  # The units that multiply and add do it.
        selecting, multiplies = 0.0, multiplies + selects / machine.fma_per_cycle
    entering = instructions / machine.instructions_per_cycle
    return max(multiplies, loads, selecting, entering, machine.fma_latency_cycles + CHAIN_CYCLES)


def _exposed(multiplies: float) -> float:
    """The part of a block of so many multiply-adds that does not overlap with its neighbours."""
    return 1 / (1 + REORDER_WINDOW / multiplies) if multiplies else 1.0


def ends_cycles(vectors: int, machine: Machine, epilogue_cost: float, multiplies: float) -> float:
    """What start and end of a block of `vectors` accumulators add: as much as does not overlap with its neighbours'
    arithmetic.
    """
    stores = vectors / machine.stores_per_cycle
    epilogue = vectors * epilogue_cost / machine.fma_per_cycle
    exposed = _exposed(multiplies)
    least = EPILOGUE_EXPOSED * machine.multiply_add_share
    epilogue_exposed = max(exposed, least) if machine.selects_per_cycle > 0 else 1.0
    return BLOCK_CYCLES + exposed * stores + epilogue_exposed * epilogue


def _spare_lanewise(conv: Convolution, columns: int, machine: Machine) -> int:
    """Registers that a lanewise block needs beside accumulators, weights and an input."""
    if machine.has_memory_operands:
        return SPARE_LANEWISE_REGISTERS
    return SPARE_LANEWISE_REGISTERS_FOR_LOADS + (conv.stride[1] - 1) * columns // 3


@lru_cache(maxsize=4096)
def lanewise_cycles(conv: Convolution, columns: int, vectors: int, machine: Machine, epilogue_cost: int) -> float:
    """Cycles of a lanewise convolution in blocks of `columns` outputs × `vectors` vectors."""
    lanes = machine.lanes(conv.element)
    full, rest = divmod(conv.out_channels, lanes * vectors)
    cycles = full * _lanewise_group_cycles(conv, columns, (lanes,) * vectors, machine, epilogue_cost) if full else 0.0
    if rest:
        cycles += _lanewise_group_cycles(conv, columns, split_lanes(rest, lanes), machine, epilogue_cost)
    return cycles * conv.images


def _lanewise_group_cycles(
    conv: Convolution, columns: int, widths: tuple[int, ...], machine: Machine, epilogue_cost: int
) -> float:
    row_uses, total = _row_uses(conv), 0.0
    fma = sum(1 / machine.fma_per_cycle_at(lanes, conv.element) for lanes in widths)
    load = sum(1 / machine.loads_per_cycle_at(lanes, conv.element) for lanes in widths)
    # Where several input channels make up one vector, each is loaded and put in place by itself.
    pieces = 1.0 if conv.group_out == 1 and conv.group_in == 1 else 2.0 * ceil_div(max(widths), conv.group_out)
    for segment, valid, distinct in _segments(conv, columns):
        # Each part of a kernel row loads its inputs anew.
        taps = unrolled_taps(len(valid)) if segment.interior else len(valid)
        parts = ceil_div(len(valid), max(1, taps))
        loads = min(sum(valid), distinct + (parts - 1) * max(0, segment.columns - conv.stride[1]))
        multiplies = sum(valid) * len(widths) * conv.kernel_rows * conv.group_in
        # Of short chains of dependent multiply-adds, several blocks' overlap.
        chain = len(valid) * machine.fma_latency_cycles * _exposed(multiplies)
        iteration = max(sum(valid) * fma, (len(valid) + loads * pieces) * load, chain)
        per_tap_row = conv.group_in * (iteration + KERNEL_ROW_CYCLES * (parts - 1)) + KERNEL_ROW_CYCLES
        accumulators = segment.columns * len(widths)
        lacking = accumulators + taps + 1 + _spare_lanewise(conv, segment.columns, machine) - machine.vector_registers
        if len(widths) > 1 and not machine.has_memory_operands:
            # LLVM loads the inputs of all vectors before it uses the first, and keeps them on the stack.
            held = accumulators + taps + distinct * len(widths) - machine.vector_registers
            per_tap_row += max(0, held) * (1 / machine.stores_per_cycle + 1 / machine.loads_per_cycle)
        elif lacking > 0:
            # So large a part of accumulators and weights is kept in memory; the accumulators have to be stored again.
            stored = lacking / (accumulators + taps) * accumulators / (accumulators + taps)
            per_tap_row += stored * sum(valid) * len(widths) * conv.group_in / machine.stores_per_cycle
        if conv.sums_in_blocks:
            sums = accumulators * conv.group_in * (parts if conv.kernel[1] > conv.element.longest_sum else 1)
            per_tap_row += sums * BLOCK_SUM_INSTRUCTIONS / machine.instructions_per_cycle
        ends = ends_cycles(segment.columns * len(widths), machine, epilogue_cost, multiplies)
        total += segment.repeat * (row_uses * per_tap_row + conv.out_height * ends)
    return total


def unrolls_tight_blocks(stage: Stage, tiling: DenseTiling, machine: Machine) -> bool:
    """Whether a task has so few column blocks, of so many registers, that LLVM was seen to spill accumulators."""
    tiled = isinstance(stage, Convolution) and tiling.blocks <= UNROLLED_BLOCKS < stage.out_width // tiling.columns
    return tiled and is_tight(tiling, machine)


def is_tight(tiling: DenseTiling, machine: Machine) -> bool:
    """Whether accumulators, weights and an input leave fewer than `TIGHT_REGISTERS` vector registers."""
    return tiling.block.registers + TIGHT_REGISTERS > machine.vector_registers
