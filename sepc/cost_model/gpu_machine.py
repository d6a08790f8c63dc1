"""Descriptions of GPUs: multiprocessors, what one of them holds, and the memory outside of them.

As for CPUs (`sepc.cost_model.machine`) a description is data: ``machines/sm_<compute capability>.toml``, with the name
of the part behind that where it is not the usual one, and ``machines/opencl.toml``. A cycle is one of the
multiprocessors' clock, also for the rate of the second-level cache, which serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Final

from sepc.cost_model.machine import GPU_PREFIXES, descriptions, malformed, read_description
from sepc.ir.element import Element

VECTOR: Final = 4
"""Channels of a vector: a float4, the widest that a thread loads or stores at once."""


def lanes_of(element: Element) -> int:
    """Numbers of that type in the widest vector that a thread loads or stores at once."""
    return VECTOR * element.per_float32


@dataclass(frozen=True)
class GpuMachine:
    """A GPU as the cost model sees it. Figures are per multiprocessor up to `shared_bytes_per_cycle`.

    Args:
        name: the description's name.
        architecture: 'sm_<compute capability>', or 'opencl'.
        multiprocessors: how many there are.
        clock_ghz: their clock under sustained load.
        warp_size: threads that execute together.
        fp32_lanes: fp32 multiply-adds per cycle.
        warps: warps resident at most.
        blocks: thread blocks resident at most.
        threads_per_block: threads in one block at most.
        registers: 32-bit registers.
        registers_per_thread: registers of one thread at most.
        shared_kib: shared memory, over all blocks.
        shared_kib_per_block: shared memory that one block may use at most.
        l1_kib: first-level cache and shared memory together: what shared memory leaves is cache.
        shared_bytes_per_cycle: what shared memory, or hits of the first-level cache, deliver.
        l2_kib: second-level cache.
        l2_bytes_per_cycle: what it delivers to all multiprocessors together.
        dram_gb_per_s: what DRAM delivers to all of them together.
        line_bytes: a cache line.
        sector_bytes: unit of transfer from DRAM and from the second level.
        launch_us: between two kernels of a stream.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock_ghz: float
    warp_size: int
    fp32_lanes: int
    warps: int
    blocks: int
    threads_per_block: int
    registers: int
    registers_per_thread: int
    shared_kib: int
    shared_kib_per_block: int
    l1_kib: int
    shared_bytes_per_cycle: float
    l2_kib: int
    l2_bytes_per_cycle: float
    dram_gb_per_s: float
    line_bytes: int
    sector_bytes: int
    launch_us: float

    @staticmethod
    def load(name: str) -> GpuMachine:
        """The description ``machines/<name>.toml``.

        Raises:
            TargetError: there is none of that name.
        """
        return _load(name)

    @staticmethod
    def known() -> tuple[str, ...]:
        """Names of all descriptions of GPUs, sorted."""
        return tuple(name for name in descriptions() if name.startswith(GPU_PREFIXES))

    @property
    def peak_flops(self) -> float:
        """fp32 operations per second at the peak; a multiply-add counts as two."""
        return 2 * self.multiprocessors * self.fp32_lanes * self.clock_ghz * 1e9

    @property
    def dram_bytes_per_cycle(self) -> float:
        """What DRAM delivers to all multiprocessors together."""
        return self.dram_gb_per_s / self.clock_ghz

    def resident_blocks(self, threads: int, registers_per_thread: int, shared_bytes: int) -> int:
        """Blocks of `threads` threads that one multiprocessor holds at a time; 0 if it cannot hold one.

        Registers are counted per thread; that they are handed out to warps in multiples of 256 is left out.
        """
        warps = -(-threads // self.warp_size)
        if threads > self.threads_per_block or shared_bytes > self.shared_kib_per_block * 1024:
            return 0
        if registers_per_thread > self.registers_per_thread:
            return 0
        by_registers = self.registers // max(1, registers_per_thread * warps * self.warp_size)
        by_shared = self.shared_kib * 1024 // shared_bytes if shared_bytes else self.blocks
        return min(self.blocks, self.warps // max(1, warps), by_registers, by_shared)


@cache
def _load(name: str) -> GpuMachine:
    return parse_gpu(name, read_description(name, GpuMachine.known()))


def parse_gpu(name: str, table: Mapping[str, Any]) -> GpuMachine:
    """The GPU that a description's TOML table says.

    Raises:
        TargetError: a key is missing, unknown, or its value makes no sense; the message names it.
    """
    values = dict(table)
    try:
        values |= {field.name: float(values[field.name]) for field in fields(GpuMachine) if field.type == "float"}
        machine = GpuMachine(name=name, **values)
        figures = [value for key, value in vars(machine).items() if key not in ("name", "architecture")]
        if min(figures) <= 0:
            raise ValueError("every figure must be positive")
    except KeyError as error:
        raise malformed(name, f"the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise malformed(name, str(error)) from error
    if machine.shared_kib_per_block > machine.shared_kib or machine.shared_kib > machine.l1_kib:
        raise malformed(name, "shared memory per block must fit the multiprocessor's, and that the first level")
    return machine
