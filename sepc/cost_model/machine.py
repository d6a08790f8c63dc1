"""Descriptions of the CPUs that sepc compiles for: vector units, memory levels and fixed overheads.

A description is data: ``machines/<name>.toml``, each figure with its source in a comment. Units are part of every name.
Vectors are counted in fp32 lanes where no type is given. A cycle is one of the core's clock, also for bandwidths of
levels outside the core.
GPUs have descriptions of their own: `sepc.cost_model.gpu_machine`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from sepc.errors import TargetError, did_you_mean
from sepc.ir.element import FLOAT32, Element

MACHINES_DIRECTORY: Final = Path(__file__).parent / "machines"
GPU_PREFIXES: Final = ("sm_", "opencl")
"""What the names of descriptions of GPUs begin with."""
UNKNOWN_STRIPS: Final = 0.5
"""Rate of strips relative to that in order, behind the second level, where a description does not state it.

Between what was measured on Zen 5 of the third level (0.5 to 0.9) and of DRAM (0.3 to 0.45).
"""


@dataclass(frozen=True)
class MemoryLevel:
    """One level of the memory hierarchy as the cores see it.

    Rates are those that straight streaming through data held at this level sustains. A write rate counts the bytes that
    the program stores; reading the line first (write-allocate) and the later write-back are included in the rate.

    Args:
        name: 'L1', 'L2', 'L3' or 'DRAM'.
        size_bytes: capacity of one instance; 0 means unbounded (DRAM).
        line_bytes: unit of transfer.
        bandwidth_bytes_per_cycle: what one core can read.
        write_bandwidth_bytes_per_cycle: what one core can store.
        shared_by_cores: how many cores share one instance (for DRAM: one path to it, as a chiplet's link or a socket).
        total_bandwidth_bytes_per_cycle: what those cores can read together.
        strip_bandwidth_bytes_per_cycle: what one core can read in strips: runs of one to four lines, far apart, which
            hardware does not foresee.
        strip_write_bandwidth_bytes_per_cycle: the same for stores.
    """

    name: str
    size_bytes: int
    line_bytes: int
    bandwidth_bytes_per_cycle: float
    write_bandwidth_bytes_per_cycle: float
    shared_by_cores: int
    total_bandwidth_bytes_per_cycle: float
    strip_bandwidth_bytes_per_cycle: float
    strip_write_bandwidth_bytes_per_cycle: float

    @property
    def is_unbounded(self) -> bool:
        """Whether everything fits (DRAM)."""
        return self.size_bytes == 0

    def size_per_core_bytes(self, cores: int) -> float:
        """Capacity that each of ``cores`` busy cores has to itself; infinite for DRAM."""
        return math.inf if self.is_unbounded else self.size_bytes / max(1, min(cores, self.shared_by_cores))

    def combined_bandwidth_bytes_per_cycle(self, cores: int) -> float:
        """What ``cores`` busy cores can read together, filling one instance of the level after the other."""
        full, rest = divmod(cores, self.shared_by_cores)
        alone = self.bandwidth_bytes_per_cycle
        total = self.total_bandwidth_bytes_per_cycle
        return full * min(self.shared_by_cores * alone, total) + min(rest * alone, total)

    def combined_write_bandwidth_bytes_per_cycle(self, cores: int) -> float:
        """As :meth:`combined_bandwidth_bytes_per_cycle`, for stores: sharing costs them the same fraction."""
        write_per_read = self.write_bandwidth_bytes_per_cycle / self.bandwidth_bytes_per_cycle
        return self.combined_bandwidth_bytes_per_cycle(cores) * write_per_read

    def read_cycles(self, streamed_bytes: float, strip_bytes: float, cores: int) -> float:
        """Cycles in which each of ``cores`` busy cores reads so many bytes in order, and so many in strips."""
        rate = self.combined_bandwidth_bytes_per_cycle(cores) / cores
        return streamed_bytes / rate + strip_bytes / min(rate, self.strip_bandwidth_bytes_per_cycle)

    def write_cycles(self, streamed_bytes: float, strip_bytes: float, cores: int) -> float:
        """As :meth:`read_cycles`, for stores."""
        rate = self.combined_write_bandwidth_bytes_per_cycle(cores) / cores
        return streamed_bytes / rate + strip_bytes / min(rate, self.strip_write_bandwidth_bytes_per_cycle)


@dataclass(frozen=True)
class Machine:
    """A CPU as the cost model sees it.

    Args:
        name: the description's name.
        architecture: 'x86-64' or 'aarch64'.
        cores: physical cores that kernels may use.
        clock_ghz: clock under sustained vector load, of all cores.
        vector_bits: width of the widest vectors.
        vector_registers: architectural vector registers.
        fma_per_cycle: full-width vector FMA instructions per cycle and core.
        half_width_fma_per_cycle: the same for vectors at most half as wide: where a full-width instruction occupies two
            narrower units (Zen 4), narrow vectors cost no throughput.
        fma_latency_cycles: cycles until an FMA's result can be accumulated into again.
        loads_per_cycle: full-width vector loads (also as an operand of an FMA).
        half_width_loads_per_cycle: loads at most half as wide, and scalars broadcast from memory.
        stores_per_cycle: full-width vector stores.
        selects_per_cycle: full-width vectors put together from two by a mask, in units that do not multiply and add; 0
            where those units would have to do it.
        instructions_per_cycle: instructions of any kind that enter execution; one with a memory operand is one.
        levels: memory levels from the fastest to DRAM.
        parallel_region_us: entering and leaving one parallel region.
        barrier_us: one barrier inside a parallel region.
        kernel_overhead_us: calling one kernel and setting up its loops, on one thread.
    """

    name: str
    architecture: str
    cores: int
    clock_ghz: float
    vector_bits: int
    vector_registers: int
    fma_per_cycle: float
    half_width_fma_per_cycle: float
    fma_latency_cycles: float
    loads_per_cycle: float
    half_width_loads_per_cycle: float
    stores_per_cycle: float
    selects_per_cycle: float
    instructions_per_cycle: float
    levels: tuple[MemoryLevel, ...]
    parallel_region_us: float
    barrier_us: float
    kernel_overhead_us: float

    @staticmethod
    def load(name: str) -> Machine:
        """The description ``machines/<name>.toml``.

        Raises:
            TargetError: there is none of that name.
        """
        return _load(name)

    @staticmethod
    def known() -> tuple[str, ...]:
        """Names of all descriptions of CPUs, sorted."""
        return tuple(name for name in descriptions() if not name.startswith(GPU_PREFIXES))

    @property
    def has_memory_operands(self) -> bool:
        """Whether a multiply-add can take one of its operands from memory."""
        return self.architecture == "x86-64"

    @property
    def vector_lanes(self) -> int:
        """fp32 values in one vector."""
        return self.lanes(FLOAT32)

    def lanes(self, element: Element) -> int:
        """Values of type `element` in one vector."""
        return self.vector_bits // (8 * element.size_bytes)

    @property
    def multiply_add_share(self) -> float:
        """The part of all instructions that multiply-adds can be: the less, the more can be done beside them."""
        return self.fma_per_cycle / self.instructions_per_cycle

    @property
    def flops_per_cycle(self) -> float:
        """fp32 operations per cycle and core at the peak; an FMA counts as two."""
        return 2 * self.vector_lanes * self.fma_per_cycle

    @property
    def peak_flops_per_core(self) -> float:
        """fp32 operations per second of one core at the peak."""
        return self.flops_per_cycle * self.clock_ghz * 1e9

    @property
    def dram(self) -> MemoryLevel:
        """The last level."""
        return self.levels[-1]

    @property
    def last_cache(self) -> MemoryLevel:
        """The largest cache."""
        return self.levels[-2]

    def level(self, name: str) -> MemoryLevel | None:
        """The memory level of that name, if the machine has it."""
        return next((level for level in self.levels if level.name == name), None)

    def cycles_to_us(self, cycles: float) -> float:
        """Microseconds that ``cycles`` take."""
        return cycles / (self.clock_ghz * 1e3)

    def fma_per_cycle_at(self, lanes: int, element: Element = FLOAT32) -> float:
        """FMA instructions per cycle and core on vectors of ``lanes`` values of type `element`.

        As many as of fp32 values: all cores with FP16 arithmetic have it in all units (Arm's optimization guides of
        Cortex-A55, A75, A76, Neoverse N1 and V1: one throughput for all forms of FMLA).
        """
        return self.fma_per_cycle if 2 * lanes > self.lanes(element) else self.half_width_fma_per_cycle

    def loads_per_cycle_at(self, lanes: int, element: Element = FLOAT32) -> float:
        """Load instructions per cycle and core of ``lanes`` values; a broadcast from memory counts as one lane."""
        return self.loads_per_cycle if 2 * lanes > self.lanes(element) else self.half_width_loads_per_cycle

    def with_clock(self, clock_ghz: float) -> Machine:
        """The same machine at another clock. DRAM keeps its bytes per second, so its bytes per cycle change."""
        scale = self.clock_ghz / clock_ghz
        dram = replace(
            self.dram,
            bandwidth_bytes_per_cycle=self.dram.bandwidth_bytes_per_cycle * scale,
            write_bandwidth_bytes_per_cycle=self.dram.write_bandwidth_bytes_per_cycle * scale,
            total_bandwidth_bytes_per_cycle=self.dram.total_bandwidth_bytes_per_cycle * scale,
            strip_bandwidth_bytes_per_cycle=self.dram.strip_bandwidth_bytes_per_cycle * scale,
            strip_write_bandwidth_bytes_per_cycle=self.dram.strip_write_bandwidth_bytes_per_cycle * scale,
        )
        return replace(self, clock_ghz=clock_ghz, levels=(*self.levels[:-1], dram))


@cache
def _load(name: str) -> Machine:
    return parse_machine(name, read_description(name, Machine.known()))


def descriptions() -> tuple[str, ...]:
    """Names of all descriptions, sorted."""
    return tuple(sorted(path.stem for path in MACHINES_DIRECTORY.glob("*.toml")))


def read_description(name: str, known: Sequence[str]) -> dict[str, Any]:
    """The TOML table of the description ``machines/<name>.toml``.

    Raises:
        TargetError: the name is not among `known`.
    """
    if name not in known:
        raise TargetError(
            f"There is no machine description '{name}'",
            why=f"known are: {', '.join(known)}",
            fix=did_you_mean(name, known, most=3) or f"add {name}.toml to {MACHINES_DIRECTORY.name}/",
        )
    return tomllib.loads((MACHINES_DIRECTORY / f"{name}.toml").read_text(encoding="utf-8"))


def parse_machine(name: str, table: Mapping[str, Any]) -> Machine:
    """The machine that a description's TOML table says.

    Raises:
        TargetError: a key is missing, unknown, or its value makes no sense; the message names it.
    """
    values = dict(table)
    try:
        # TOML writes whole numbers without a point; they are floats all the same.
        values |= {f.name: float(values[f.name]) for f in fields(Machine) if f.type == "float"}
        clock_ghz = values["clock_ghz"]
        levels = tuple(_parse_level(level, clock_ghz, index) for index, level in enumerate(values.pop("levels")))
        machine = Machine(name=name, levels=levels, **values)
    except KeyError as error:
        raise malformed(name, f"the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise malformed(name, str(error)) from error
    if problem := _inconsistency(machine):
        raise malformed(name, problem)
    return machine


def _parse_level(table: Mapping[str, Any], clock_ghz: float, index: int) -> MemoryLevel:
    """The ``[[levels]]`` table number `index`; caches state bytes per cycle, DRAM states gigabytes per second.

    Rates in strips need not be stated: see `UNKNOWN_STRIPS`.
    """
    values = dict(table)
    rates: dict[str, float] = {}
    for rate in ("read", "write", "total", "strip_read", "strip_write"):
        streamed = rates.get(rate.removeprefix("strip_"))
        if f"{rate}_gb_per_s" in values:
            rates[rate] = float(values.pop(f"{rate}_gb_per_s")) / clock_ghz
        elif streamed is not None and f"{rate}_bytes_per_cycle" not in values:
            rates[rate] = streamed * (UNKNOWN_STRIPS if index > 1 else 1.0)
        else:
            rates[rate] = float(values.pop(f"{rate}_bytes_per_cycle"))
    level = MemoryLevel(
        name=values.pop("name"),
        size_bytes=int(values.pop("size_kib") * 1024),
        line_bytes=values.pop("line_bytes"),
        shared_by_cores=values.pop("shared_by_cores"),
        bandwidth_bytes_per_cycle=rates["read"],
        write_bandwidth_bytes_per_cycle=rates["write"],
        total_bandwidth_bytes_per_cycle=rates["total"],
        strip_bandwidth_bytes_per_cycle=rates["strip_read"],
        strip_write_bandwidth_bytes_per_cycle=rates["strip_write"],
    )
    if values:
        raise ValueError(f"level {level.name} has unknown keys: {', '.join(sorted(values))}")
    return level


def _inconsistency(machine: Machine) -> str:
    """What is wrong with the figures, or nothing."""
    if len(machine.levels) < 2 or not machine.dram.is_unbounded:
        return "the last of at least two levels must be DRAM, with size 0"
    sizes = [level.size_bytes for level in machine.levels[:-1]]
    if sizes != sorted(sizes) or sizes[0] <= 0:
        return f"cache sizes must be positive and grow from level to level, not {sizes} bytes"
    figures = (machine.cores, machine.clock_ghz, machine.fma_per_cycle, machine.vector_bits, machine.vector_registers)
    rates = [rate for level in machine.levels for rate in (level.bandwidth_bytes_per_cycle, level.shared_by_cores)]
    if min(*figures, *rates) <= 0:
        return "cores, clock, vector figures, bandwidths and sharing must be positive"
    return ""


def malformed(name: str, problem: str) -> TargetError:
    """The error for a description with that problem."""
    like, module = ("sm_80", "gpu_machine") if name.startswith(GPU_PREFIXES) else ("znver5", "machine")
    return TargetError(
        f"The machine description '{name}' is malformed",
        where=f"machines/{name}.toml",
        why=problem,
        fix=f"compare it with machines/{like}.toml; sepc/cost_model/{module}.py documents every key",
    )
