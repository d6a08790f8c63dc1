"""What was measured on a host, kept in the user's cache directory, and a machine's description with these figures.

The file states its format and the processor that was measured. A file of another processor, as in a home directory that
several machines share, or a damaged one is ignored with one line in the log.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from sepc.cost_model.machine import Machine, MemoryLevel

FORMAT_VERSION: Final = 1
FILE_NAME: Final = "calibration.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LevelRates:
    """Rates of one memory level, in bytes per nanosecond.

    Args:
        read_gb_per_s: what one thread reads.
        write_gb_per_s: what one thread stores.
        all_read_gb_per_s: what one thread per core reads, all together.
    """

    read_gb_per_s: float
    write_gb_per_s: float
    all_read_gb_per_s: float


@dataclass(frozen=True)
class Measurements:
    """What `sepc.calibrate` measures.

    Args:
        clock_ghz: cycles per nanosecond of scalar code.
        fma_per_ns: full-width multiply-adds per nanosecond of one core.
        levels: rates from the first cache to DRAM.
        parallel_region_us: entering and leaving a parallel region of all cores.
        barrier_us: a barrier of all cores.
    """

    clock_ghz: float
    fma_per_ns: float
    levels: tuple[LevelRates, ...]
    parallel_region_us: float
    barrier_us: float

    @staticmethod
    def of(table: Mapping[str, Any]) -> Measurements:
        """The measurements in a table as `dataclasses.asdict` makes it; raises ValueError, TypeError or KeyError."""
        levels = tuple(LevelRates(**level) for level in table["levels"])
        found = Measurements(**{**table, "levels": levels})
        figures = [value for name, value in vars(found).items() if name != "levels"]
        figures += [value for level in levels for value in vars(level).values()]
        if not all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in figures):
            raise ValueError("figures must be positive numbers")
        return found


def calibrated(machine: Machine, measured: Measurements) -> Machine:
    """`machine` with what was measured; figures that are not measured stay.

    The clock is the one under vector load: the units are a multiple of half a vector per cycle, so that what is missing
    to that multiple is a lower clock. A level is not faster than the one before it.
    """
    fma_per_cycle = max(0.5, round(2 * measured.fma_per_ns / measured.clock_ghz) / 2)
    clock_ghz = measured.fma_per_ns / fma_per_cycle
    levels: list[MemoryLevel] = []
    for level, rates in zip(machine.levels, measured.levels, strict=True):
        fastest = levels[-1].bandwidth_bytes_per_cycle if levels else math.inf
        read = min(fastest, rates.read_gb_per_s / clock_ghz)
        together = rates.all_read_gb_per_s / clock_ghz * level.shared_by_cores / machine.cores
        levels.append(
            replace(
                level,
                bandwidth_bytes_per_cycle=read,
                write_bandwidth_bytes_per_cycle=rates.write_gb_per_s / clock_ghz,
                total_bandwidth_bytes_per_cycle=max(read, together) if level.shared_by_cores > 1 else read,
            )
        )
    return replace(
        machine,
        clock_ghz=clock_ghz,
        fma_per_cycle=fma_per_cycle,
        half_width_fma_per_cycle=max(fma_per_cycle, machine.half_width_fma_per_cycle),
        levels=tuple(levels),
        parallel_region_us=measured.parallel_region_us,
        barrier_us=measured.barrier_us,
    )


def cache_directory() -> Path:
    """Where sepc keeps files of the user: ``$SEPC_CACHE_DIR``, else the system's place for caches."""
    if own := os.environ.get("SEPC_CACHE_DIR"):
        return Path(own)
    import platformdirs

    return Path(platformdirs.user_cache_dir("sepc"))


def store(measured: Measurements, machine: Machine, cpu_name: str) -> Path:
    """Keep what was measured on `machine`; returns the file. It is written whole or not at all. Raises OSError."""
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = {"format": FORMAT_VERSION, "host": _identity(machine, cpu_name), "measured": asdict(measured)}
    with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    return Path(file.name).replace(directory / FILE_NAME)


def with_stored(machine: Machine, cpu_name: str) -> Machine:
    """`machine` with the figures stored for it, or as it is where there are none."""
    path = cache_directory() / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT_VERSION or content["host"] != _identity(machine, cpu_name):
            logger.warning(
                "ignoring %s: it is of another processor or version of sepc; sepc.calibrate() renews it", path
            )
            return machine
        return calibrated(machine, Measurements.of(content["measured"]))
    except FileNotFoundError:
        return machine
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("ignoring %s, which is damaged (%r); sepc.calibrate() renews it", path, error)
        return machine


def _identity(machine: Machine, cpu_name: str) -> dict[str, Any]:
    """What has to be equal for measurements to hold."""
    sizes = [[level.name, level.size_bytes, level.shared_by_cores] for level in machine.levels]
    return {"cpu": cpu_name, "vector_bits": machine.vector_bits, "cores": machine.cores, "levels": sizes}
