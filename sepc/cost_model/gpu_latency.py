"""Predicted time of a kernel on a GPU: waves of blocks, each as long as what keeps it longest, and the launch.

A wave is the blocks that all multiprocessors hold at a time; the last one may be smaller, and then some of them idle.
Its time is the greatest of what its blocks take to execute, of the latency of one block, and of its share of the bytes
from the second level and from DRAM.

Bytes from the second level are what each block touches (`sepc.cost_model.gpu_traffic`), in whole sectors, and again
what the first level could not keep. Bytes from DRAM are what the second level cannot keep from one block to another, by
the same propagation of footprints as for the caches of CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

from sepc.cost_model.gpu_blocks import BARRIER_CYCLES, NOTHING, BlockWork, copy_work, item_work
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_tiling import GpuLink, GpuTiling, Tile, is_dense, link_tiles, read_tile
from sepc.cost_model.gpu_traffic import Links, Walk, walk, weights_of
from sepc.cost_model.latency import Cost
from sepc.cost_model.loops import run_bytes
from sepc.cost_model.traffic import missing_part
from sepc.ir.arithmetic import ceil_div

MULTIPROCESSOR_BYTES_PER_CYCLE: Final = 64.0
"""What one multiprocessor gets from the second level (Jia et al., arXiv 1804.06826 and 1903.07486)."""
KIB: Final = 1024


class Moved(NamedTuple):
    """Bytes that all blocks of a kernel move together, to or from each level."""

    l2: float
    dram: float


@dataclass(frozen=True)
class Grid:
    """Blocks on a GPU: how many, and how many of them a multiprocessor holds at a time."""

    blocks: int
    resident: int
    machine: GpuMachine

    def cost(self, flops: int, work: BlockWork, moved: Moved, bytes_moved: float) -> Cost:
        """The cost of blocks that do `work` each.

        Args:
            flops: floating-point operations of all.
            work: what each does.
            moved: what they move together.
            bytes_moved: compulsory bytes.
        """
        machine, compute, bound = self.machine, 0.0, dict[str, float]()
        for count, waves in self._waves:
            wave = self._wave_cycles(work, count, moved)
            longest = max(wave, key=lambda name: wave[name])
            bound[longest] = bound.get(longest, 0.0) + waves * wave[longest]
            compute += waves * wave["compute"]
        cycles_per_us = machine.clock_ghz * 1e3
        kernel_us = sum(bound.values()) / cycles_per_us
        bottleneck = "launch" if machine.launch_us > kernel_us else max(bound, key=lambda name: bound[name])
        levels = (("L2", moved.l2), ("DRAM", moved.dram))
        return Cost(flops, compute / cycles_per_us, levels, bytes_moved, kernel_us + machine.launch_us, bottleneck)

    @property
    def _waves(self) -> list[tuple[int, int]]:
        """Blocks of a wave, and how many such waves there are."""
        together = self.machine.multiprocessors * self.resident
        full, rest = divmod(self.blocks, together)
        return [wave for wave in ((together, full), (rest, min(rest, 1))) if wave[1]]

    def _wave_cycles(self, work: BlockWork, blocks: int, moved: Moved) -> dict[str, float]:
        """Cycles of a wave of so many blocks, by what could keep it that long."""
        machine, share = self.machine, blocks / self.blocks
        busiest, busy = ceil_div(blocks, machine.multiprocessors), min(blocks, machine.multiprocessors)
        l2_rate = min(machine.l2_bytes_per_cycle, busy * MULTIPROCESSOR_BYTES_PER_CYCLE)
        return {
            "compute": busiest * max(work.issue_cycles, work.multiply_add_cycles),
            "shared": busiest * work.access_cycles,
            "latency": work.latency_cycles,
            "L2": share * moved.l2 / l2_rate,
            "DRAM": share * moved.dram / min(l2_rate, machine.dram_bytes_per_cycle),
        }


@dataclass
class GpuProblem:
    """A convolution, or a chain of them, as one kernel on a GPU. What several tilings have in common is kept.

    Attributes:
        links: the convolutions. machine: the GPU.
        epilogue_costs: per link, vector instructions per vector of results that follow.
        operand_bytes: per link, bytes of the tensors that these read.
        quickest: what the search found: per link, tile and number of threads the quickest register block.
    """

    links: Links
    machine: GpuMachine
    epilogue_costs: Sequence[int]
    operand_bytes: Sequence[int]
    _items: dict[tuple[int, GpuLink], BlockWork] = field(default_factory=dict, repr=False)
    _grids: dict[Tile, _TiledGrid] = field(default_factory=dict, repr=False)
    quickest: dict[tuple[int, Tile, int], GpuLink] = field(default_factory=dict, repr=False)

    @cached_property
    def copies_input(self) -> bool:
        """Whether its input is copied to shared memory."""
        return len(self.links) == 1 and is_dense(self.links[0])

    @cached_property
    def element_bytes(self) -> int:
        """Of one number."""
        return self.links[0].element.size_bytes

    def item(self, index: int, link: GpuLink) -> BlockWork:
        """What a warp does for items of link number `index`."""
        found = self._items.get((index, link))
        if found is None:
            from_global = index == 0 and not self.copies_input
            cost = self.epilogue_costs[index]
            found = item_work(self.links[index], link, cost, self.machine, from_global=from_global)
            self._items[index, link] = found
        return found

    def predict(self, tiling: GpuTiling) -> Cost:
        """The cost under `tiling`, which the machine can hold."""
        grid = self._tiled(tiling)
        resident = self.machine.resident_blocks(tiling.threads, tiling.registers, tiling.shared_bytes)
        tiles = link_tiles(self.links, tiling.rows, tiling.columns, tiling.channels, tiling.chunk)
        moved = Moved(grid.l2_bytes(tiling, tiles, resident), grid.dram_bytes)
        flops = sum(link.flops for link in self.links)
        blocks = Grid(grid.walked.blocks, resident, self.machine)
        return blocks.cost(flops, self._block_work(tiling, tiles), moved, grid.compulsory_bytes)

    def global_bytes(self, tiling: GpuTiling) -> float:
        """What all blocks load from and store to global memory under `tiling`, each what it touches once."""
        grid = self._tiled(tiling)
        return self.element_bytes * grid.walked.elements.total + grid.operand_bytes

    def _tiled(self, tiling: GpuTiling) -> _TiledGrid:
        block = Tile(tiling.rows, tiling.columns, tiling.channels)
        grid = self._grids.get(block)
        if grid is None:
            grid = self._grids[block] = _TiledGrid(self, walk(self.links, *block))
        return grid

    def _block_work(self, tiling: GpuTiling, tiles: Sequence[Tile]) -> BlockWork:
        """What a block does, of which `tiles` are the tiles of the links."""
        turns, last, work = turns_of(self.links, tiling.chunk), len(self.links) - 1, NOTHING
        if self.copies_input:
            copied = read_tile(self.links[0], tiling.rows, tiling.columns, tiling.chunk)
            work = work.plus(copy_work(copied, self.links[0].element, tiling.threads, self.machine), turns)
        for index, (link, tile) in enumerate(zip(tiling.links, tiles, strict=True)):
            own = self.item(index, link).spread(tile.items(link), tiling.threads, self.machine.warp_size)
            # The sums of a dense last link stay: one item, whose steps are spread over the turns.
            work = work.plus(own, 1 if index == last else turns)
        barriers = 2 * turns if tiling.chunk else last
        return work._replace(latency_cycles=work.latency_cycles + barriers * BARRIER_CYCLES)


def turns_of(links: Links, chunk: int) -> int:
    """How many turns a block takes."""
    return ceil_div(links[-1].in_channels, chunk) if chunk else 1


@dataclass(frozen=True)
class _TiledGrid:
    """A problem cut into blocks of one size, however these are made."""

    problem: GpuProblem
    walked: Walk

    @cached_property
    def operand_bytes(self) -> float:
        """Bytes of what elementwise operators read, each link's as often as its results are computed."""
        links = enumerate(zip(self.problem.operand_bytes, self.problem.links, strict=True))
        return sum(
            own * self.walked.computed(index) / (link.pixels * link.out_channels) for index, (own, link) in links if own
        )

    @cached_property
    def compulsory_bytes(self) -> float:
        """What is read or written once."""
        elements = self.walked.elements
        once = elements.compulsory + elements.weights + elements.results
        return self.problem.element_bytes * once + sum(self.problem.operand_bytes)

    @cached_property
    def dram_bytes(self) -> float:
        """Bytes between DRAM and the second level.

        As for the last cache of a CPU, what fits is taken to be there, left by the kernel before. Weights are not.
        """
        nest = self.walked.nest(self.operand_bytes)
        moved = nest.into_cache(self.problem.machine.l2_kib * KIB)
        return moved.tensors + max(moved.weights, nest.footprints[0].weights)

    def l2_bytes(self, tiling: GpuTiling, tiles: Sequence[Tile], resident: int) -> float:
        """Bytes between the second level and the blocks, of which each multiprocessor holds `resident`."""
        problem, machine, elements = self.problem, self.problem.machine, self.walked.elements
        first, last, size = problem.links[0], problem.links[-1], problem.element_bytes
        first_level = max(1.0, machine.l1_kib * KIB / resident - tiling.shared_bytes)
        turns = turns_of(problem.links, tiling.chunk)
        # Neighbouring channels of a pixel that are read in a turn, and how often the tile is gone through.
        whole = is_dense(first) and not problem.copies_input
        run = first.in_channels if whole else min(tiling.chunk or tiling.channels, first.in_channels)
        passes = 1 if problem.copies_input else turns if whole else first.kernel[0]
        read = size * math.prod(read_tile(first, tiles[0].rows, tiles[0].columns, run))
        again = missing_part(read / first_level) * (passes - 1)
        inputs = (elements.compulsory + elements.halo + elements.reread) * (1 + again)
        # Further rounds of a link's items read its weights of this turn again.
        rounds = max(ceil_div(tile.items(link), tiling.threads) for tile, link in zip(tiles, tiling.links, strict=True))
        own = size * sum(map(weights_of, problem.links)) / (turns * self.walked.channel_tiles)
        again = missing_part(own / first_level) * (rounds - 1)
        weights = (elements.weights + elements.weights_reread) * (1 + again)
        written = min(tiling.channels, last.out_channels)
        sector = machine.sector_bytes
        return (
            inputs * run_bytes(run, first.in_channels, first.element, sector) / run
            + size * weights
            + elements.results * run_bytes(written, last.out_channels, last.element, sector) / written
            + self.operand_bytes
        )


def predict_gpu(
    links: Links,
    tiling: GpuTiling,
    machine: GpuMachine,
    epilogue_costs: Sequence[int],
    operand_bytes: Sequence[int],
) -> Cost:
    """The cost of `links` as one kernel under `tiling`; arguments as the attributes of `GpuProblem`."""
    return GpuProblem(links, machine, epilogue_costs, operand_bytes).predict(tiling)
