"""What a machine does at the most: multiply-adds without pause, and bytes per memory level.

A kernel of F operations that moves B bytes takes at least max(F / peak, B / bandwidth); F / B is its intensity, and
peak / bandwidth the *waterline* that it has to be above for arithmetic to be what bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.machine import Machine
from sepc.ir.element import FLOAT32, Element


@dataclass(frozen=True)
class Roofline:
    """The most that some threads of a machine do.

    Attributes:
        peak_gflops: 10⁹ floating-point operations per second, a multiply-add being two.
        bandwidth_gb_per_s: by the name of each memory level behind the first, the fastest first.
    """

    peak_gflops: float
    bandwidth_gb_per_s: Mapping[str, float]

    @staticmethod
    def of(machine: Machine | GpuMachine, threads: int = 1, element: Element = FLOAT32) -> Roofline:
        """That of `machine`, in numbers of type `element`; a GPU is always used as a whole."""
        if isinstance(machine, GpuMachine):
            lanes = machine.multiprocessors * machine.fp32_lanes
            l2 = machine.l2_bytes_per_cycle * machine.clock_ghz
            return Roofline(2 * lanes * machine.clock_ghz, {"L2": l2, "DRAM": machine.dram_gb_per_s})
        flops_per_cycle = 2 * machine.lanes(element) * machine.fma_per_cycle * threads
        return Roofline(
            flops_per_cycle * machine.clock_ghz,
            {
                level.name: level.combined_bandwidth_bytes_per_cycle(threads) * machine.clock_ghz
                for level in machine.levels[1:]
            },
        )

    def compute_us(self, flops: float) -> float:
        """Microseconds of so many operations at the peak."""
        return flops / self.peak_gflops / 1e3

    def bytes_us(self, level: str, count: float) -> float:
        """Microseconds of so many bytes of a memory level."""
        return count / self.bandwidth_gb_per_s[level] / 1e3

    def waterline(self, level: str) -> float:
        """Floating-point operations per byte of a memory level, from which on arithmetic is the bound."""
        return self.peak_gflops / self.bandwidth_gb_per_s[level]

    def slowest_level(self, bytes_per_level: Mapping[str, float]) -> str:
        """The level whose bytes take the longest; empty if there are none."""
        return max(
            (level for level, count in bytes_per_level.items() if count > 0),
            key=lambda level: self.bytes_us(level, bytes_per_level[level]),
            default="",
        )
