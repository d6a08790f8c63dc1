"""`sepc.calibrate`: measure this host, and use what was found wherever 'native' is meant.

A small C program (``calibrate.c``) does the measuring in a process of its own, so that neither the threads nor the
settings of the calling program touch it. Every figure is the best of several samples, as other programs only ever make
things slower.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from sepc.c_compiler import c_compiler, cross_compiler
from sepc.cost_model.calibration import LevelRates, Measurements, calibrated, store
from sepc.cost_model.detect import HostCpu, describe_host, host_cpu
from sepc.cost_model.machine import Machine
from sepc.errors import BuildError, TargetError
from sepc.progress import waiting
from sepc.target import Target

SOURCE: Final = Path(__file__).with_name("calibrate.c")
SAMPLE_SECONDS: Final = 0.04
SAMPLES: Final = 9
DRAM_PER_CACHE: Final = 4
"""Size of the working set for DRAM relative to the last cache."""
MOST_DRAM_BYTES: Final = 256 * 2**20
TIME_LIMIT_SECONDS: Final = 60


# How a compiler is told of vectors of so many bits.
VECTOR_FLAGS: Final[Mapping[tuple[str, int], tuple[str, ...]]] = {
    ("x86-64", 256): ("-march=x86-64-v3",),
    ("x86-64", 512): ("-march=x86-64-v4",),
    ("aarch64", 128): (),
}
# Threads that spin between regions, as they do in a busy program, each on a core of its own: left to the scheduler, two
# of them may share a core all the time where others keep the rest busy.
ENVIRONMENT: Final = {"OMP_PLACES": "cores", "OMP_PROC_BIND": "close"}


class Device(Protocol):
    """A device that is measured, as `sepc.remote` knows it."""

    address: str

    def cpu(self, target: Target) -> HostCpu:
        """Its processor."""

    def machine(self, target: Target) -> Machine:
        """Its description, with what its system reports."""

    def execute(self, program: bytes, arguments: Sequence[str], environment: Mapping[str, str], target: Target) -> str:
        """What a program prints that runs there."""


class Runner(Protocol):
    """Where devices come from: see `sepc.remote`."""

    def boards(self) -> AbstractContextManager[Sequence[Device]]:
        """All devices of one kind."""


def calibrate(*, runner: Runner | None = None, target: str | Target = "native") -> Machine:
    """Measure this host, store the result for later, and return its description with it; takes some five seconds.

    From then on ``target="native"`` uses it, in every process of this user. ``$SEPC_CACHE_DIR`` says where it is kept.

    With a `runner` its devices are measured instead, all at once, and nothing is stored. The best of each figure
    counts, as other programs only ever make things slower. To compile with the result, give
    ``target=sepc.Target.parse("arm64:cortex-a72").with_machine(result)``.

    Args:
        runner: devices, from `sepc.remote`.
        target: a target of the devices' architecture, such as "arm64".

    Raises:
        TargetError: sepc has no kernels for this processor; or the devices are of several kinds, or not of that
            architecture. DeviceError: a device is lost.
        BuildError: there is no C compiler, or the measuring program failed.
        OSError: the result cannot be stored.
    """
    if runner is not None:
        return _calibrate_devices(runner, Target.parse(target))
    cpu = host_cpu()
    machine = describe_host(cpu)
    measured = measure(machine)
    store(measured, machine, cpu.identity)
    return calibrated(machine, measured)


def measure(machine: Machine, sample_seconds: float = SAMPLE_SECONDS, samples: int = SAMPLES) -> Measurements:
    """Measure this host, which is a `machine`; raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="sepc-") as directory:
        program = _build(c_compiler(), machine, Path(directory))
        with waiting("measuring this host"):
            return parse_measurements(_run([str(program), *_arguments(machine, sample_seconds, samples)]), machine)


def _calibrate_devices(runner: Runner, target: Target) -> Machine:
    """The description of the devices, which must be of one kind, with the best that was measured on any of them."""
    with runner.boards() as devices:
        kinds = {device.cpu(target).identity: device.address for device in devices}
        if len(kinds) > 1:
            why = ", ".join(f"{address} is {identity}" for identity, address in kinds.items())
            raise TargetError("The devices are not of one kind", why=why, fix="give each kind a key of its own")
        machine = devices[0].machine(target)
        with tempfile.TemporaryDirectory(prefix="sepc-") as directory:
            # Statically, so that the devices need no OpenMP.
            program = _build(cross_compiler(target), machine, Path(directory), "-static").read_bytes()
        arguments = _arguments(machine, SAMPLE_SECONDS, SAMPLES)
        with ThreadPoolExecutor(len(devices)) as pool:
            texts = list(pool.map(lambda one: one.execute(program, arguments, ENVIRONMENT, target), devices))
    return calibrated(machine, best([parse_measurements(text, machine) for text in texts]))


def best(found: Sequence[Measurements]) -> Measurements:
    """Of each figure the best of all measurements."""
    levels = (
        LevelRates(
            max(one.read_gb_per_s for one in level),
            max(one.write_gb_per_s for one in level),
            max(one.all_read_gb_per_s for one in level),
        )
        for level in zip(*(one.levels for one in found), strict=True)
    )
    return Measurements(
        max(one.clock_ghz for one in found),
        max(one.fma_per_ns for one in found),
        tuple(levels),
        min(one.parallel_region_us for one in found),
        min(one.barrier_us for one in found),
    )


def parse_measurements(text: str, machine: Machine) -> Measurements:
    """What the measuring program has printed on a `machine`; raises BuildError if that is something else."""
    try:
        figures = {name: float(number) for name, number in (line.split() for line in text.splitlines())}
        levels = tuple(
            LevelRates(*(figures[f"{kind}_gb_per_s.{level}"] for kind in ("read", "write", "all_read")))
            for level in range(len(machine.levels))
        )
        return Measurements(
            figures["clock_ghz"], figures["fma_per_ns"], levels, figures["parallel_region_us"], figures["barrier_us"]
        )
    except (ValueError, KeyError) as error:
        raise BuildError("The measuring program failed", why=f"it has printed {text[-200:]!r}") from error


def _build(compiler: str, machine: Machine, directory: Path, *more: str) -> Path:
    """The measuring program for a `machine`."""
    program, bits = directory / "calibrate", machine.vector_bits
    flags = ["-O3", *VECTOR_FLAGS[machine.architecture, bits], "-ffp-contract=fast", "-fopenmp", *more]
    _run([compiler, *flags, f"-DVECTOR_BYTES={bits // 8}", "-o", str(program), str(SOURCE)])
    return program


def _arguments(machine: Machine, sample_seconds: float, samples: int) -> list[str]:
    return [str(machine.cores), str(sample_seconds), str(samples), *map(str, working_sets(machine))]


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
    # Whatever the caller's settings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment |= ENVIRONMENT
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
