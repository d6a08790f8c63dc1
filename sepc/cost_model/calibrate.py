"""`sepc.calibrate`: measure this host, and use what was found wherever 'native' is meant.

A small C program (``calibrate.c``) does the measuring in a process of its own, so that neither the threads nor the
settings of the calling program touch it. Every figure is the best of several samples, as other programs only ever make
things slower.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from sepc.c_compiler import c_compiler
from sepc.cost_model.calibration import LevelRates, Measurements, calibrated, store
from sepc.cost_model.detect import describe_host, host_cpu
from sepc.cost_model.machine import Machine
from sepc.errors import BuildError

SOURCE: Final = Path(__file__).with_name("calibrate.c")
SAMPLE_SECONDS: Final = 0.04
SAMPLES: Final = 9
DRAM_PER_CACHE: Final = 4
"""Size of the working set for DRAM relative to the last cache."""
MOST_DRAM_BYTES: Final = 256 * 2**20
TIME_LIMIT_SECONDS: Final = 60


def calibrate() -> Machine:
    """Measure this host, store the result for later, and return its description with it; takes some five seconds.

    From then on ``target="native"`` uses it, in every process of this user. ``$SEPC_CACHE_DIR`` says where it is kept.

    Raises:
        TargetError: sepc has no kernels for this processor.
        BuildError: there is no C compiler, or the measuring program failed.
        OSError: the result cannot be stored.
    """
    cpu = host_cpu()
    machine = describe_host(cpu)
    measured = measure(machine)
    store(measured, machine, cpu.identity)
    return calibrated(machine, measured)


def measure(machine: Machine, sample_seconds: float = SAMPLE_SECONDS, samples: int = SAMPLES) -> Measurements:
    """Measure this host, which is a `machine`; raises BuildError."""
    sizes = working_sets(machine)
    with tempfile.TemporaryDirectory(prefix="sepc-") as directory:
        program = Path(directory) / "calibrate"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", f"-DVECTOR_BYTES={machine.vector_bits // 8}"]
        _run([c_compiler(), *flags, "-o", str(program), str(SOURCE)])
        output = _run([str(program), str(machine.cores), str(sample_seconds), str(samples), *map(str, sizes)])
    figures = {name: float(number) for name, number in (line.split() for line in output.splitlines())}
    levels = [
        LevelRates(*(figures[f"{kind}_gb_per_s.{level}"] for kind in ("read", "write", "all_read")))
        for level in range(len(sizes))
    ]
    return Measurements(
        figures["clock_ghz"],
        figures["fma_per_ns"],
        tuple(levels),
        figures["parallel_region_us"],
        figures["barrier_us"],
    )


def working_sets(machine: Machine) -> list[int]:
    """Bytes of one thread's data that is at home in each level, also with one thread per core."""
    sizes: list[int] = []
    before = 0.0
    for level in machine.levels[:-1]:
        own = level.size_per_core_bytes(machine.cores)
        sizes.append(int((before * own) ** 0.5 if before and own > 2 * before else own / 2))
        before = own
    return [*sizes, min(DRAM_PER_CACHE * machine.last_cache.size_bytes, MOST_DRAM_BYTES)]


def _run(command: list[str]) -> str:
    """What `command` prints. Raises BuildError where it fails or takes too long."""
    # Threads that spin between regions, as they do in a busy program, each on a core of its own, whatever the caller's
    # settings: left to the scheduler, two of them may share a core all the time where others keep the rest busy.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment |= {"OMP_PLACES": "cores", "OMP_PROC_BIND": "close"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, timeout=TIME_LIMIT_SECONDS
        )
    except subprocess.SubprocessError as error:
        reason = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise BuildError(
            "The host could not be measured",
            where=" ".join(command[:6]) + " …",
            why=reason[-1],
            fix="check that the C compiler works and supports OpenMP; without calibration sepc uses a description",
        ) from error
    return done.stdout
