"""What machine is this? From /proc and /sys on Linux; elsewhere a conservative description of the same architecture.

Only text files are read, so this takes a few milliseconds. Figures that the system does not tell (bandwidths, FMA
units, overheads) come from the description of the detected core, or from `sepc.calibrate` if it has run here.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from sepc.cost_model.calibration import with_stored
from sepc.cost_model.cpus import CPUS, LINUX_FLAGS
from sepc.cost_model.machine import Machine, MemoryLevel
from sepc.cost_model.x86_cpus import LEVEL_FEATURES, LINUX_FLAG_OF_FEATURE, X86_CPUS
from sepc.errors import TargetError

X86_ARCHITECTURES: Final = frozenset({"x86_64", "amd64", "x64"})
ARM_ARCHITECTURES: Final = frozenset({"aarch64", "arm64"})
ALL_CORES_PER_HIGHEST_CLOCK: Final = 0.85
"""Clock of all cores under load, relative to the turbo clock of one: typical of desktop and server parts (estimate)."""


@dataclass(frozen=True)
class HostCpu:
    """The processor that this program runs on.

    Args:
        architecture: 'x86-64' or 'aarch64', else what Python's ``platform.machine()`` says in lower case.
        llvm_cpu: LLVM's name of the core, or the generic level ('x86-64-v3') where the core is not known; empty where
            the processor is an x86 without AVX2 and FMA, or of another architecture.
        flags: feature flags of /proc/cpuinfo; None where they cannot be read (not Linux).
        machine_name: the description that represents the core; empty where ``llvm_cpu`` is.
        is_virtual: whether a hypervisor announces itself.
        reported_clock_ghz: fastest 'cpu MHz' in /proc/cpuinfo; 0 if unknown.
        model_name: as in /proc/cpuinfo; empty if unknown.
    """

    architecture: str
    llvm_cpu: str
    flags: frozenset[str] | None
    machine_name: str
    is_virtual: bool = False
    reported_clock_ghz: float = 0.0
    model_name: str = ""

    @property
    def identity(self) -> str:
        """What tells processors apart whose measurements must not be mixed up."""
        return f"{self.llvm_cpu or self.architecture}: {self.model_name}"

    def lacks(self, llvm_features: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the features that the processor does not announce; none where its flags cannot be read."""
        if self.flags is None:
            return ()
        return tuple(name for name in llvm_features if LINUX_FLAGS.get(name, name) not in self.flags)


def detect_host() -> Machine:
    """The machine that this program runs on, with the figures that `sepc.calibrate` has stored if there are any.

    Raises:
        TargetError: sepc has no kernels for this processor.
    """
    return with_stored(describe_host(host_cpu()), host_cpu().identity)


@lru_cache(maxsize=1)
def host_cpu() -> HostCpu:
    """The processor that this program runs on, read once."""
    return read_host_cpu(Path("/"), platform.machine())


def read_host_cpu(root: Path, architecture: str) -> HostCpu:
    """The processor that ``root``/proc/cpuinfo describes; ``architecture`` as ``platform.machine()`` names it."""
    text = _read(root / "proc/cpuinfo")
    if architecture.lower() in ARM_ARCHITECTURES:
        return _arm_cpu(text)
    if architecture.lower() not in X86_ARCHITECTURES:
        return HostCpu(architecture.lower(), llvm_cpu="", flags=None, machine_name="")
    # The first processor stands for all: x86 systems do not mix instruction sets.
    first = _cpuinfo_fields(text.split("\n\n", 1)[0])
    if "flags" not in first:
        return HostCpu("x86-64", llvm_cpu="x86-64-v3", flags=None, machine_name="x86-64-v3")
    flags = frozenset(first["flags"].split())
    clocks_mhz = [_number(line.partition(":")[2]) for line in text.splitlines() if line.startswith("cpu MHz")]
    family, model = int(_number(first.get("cpu family", ""))), int(_number(first.get("model", "")))
    llvm_cpu = identify(first.get("vendor_id", ""), family, model, flags)
    machine_name = X86_CPUS[llvm_cpu].machine if llvm_cpu else ""
    if llvm_cpu == "znver5" and model in _ZEN5_MODELS_WITH_256_BIT_UNITS:
        machine_name = "znver4"
    return HostCpu(
        architecture="x86-64",
        llvm_cpu=llvm_cpu,
        flags=flags,
        machine_name=machine_name,
        is_virtual="hypervisor" in flags,
        reported_clock_ghz=max(clocks_mhz, default=0.0) / 1e3,
        model_name=first.get("model name", ""),
    )


def _arm_cpu(cpuinfo: str) -> HostCpu:
    """The processor that `cpuinfo` describes; of cores of several kinds, those with the most arithmetic."""
    blocks = [fields for block in cpuinfo.split("\n\n") if "CPU part" in (fields := _cpuinfo_fields(block))]
    if not blocks:  # macOS: every such Mac has an M1 or a later core.
        name = "apple-a14" if not cpuinfo else "generic"
        return HostCpu("aarch64", llvm_cpu=name, flags=None, machine_name=CPUS[name].machine)
    flags = frozenset(blocks[0].get("Features", "").split())
    parts = {(_hexadecimal(one.get("CPU implementer", "")), _hexadecimal(one["CPU part"])) for one in blocks}
    known = {_ARM_PARTS[part] for part in parts if part in _ARM_PARTS}
    names = [name for name in sorted(known) if all(LINUX_FLAGS.get(f, f) in flags for f in CPUS[name].features)]
    name = max(names or ["generic"], key=lambda one: Machine.load(CPUS[one].machine).peak_flops_per_core)
    return HostCpu(
        architecture="aarch64",
        llvm_cpu=name,
        flags=flags,
        machine_name=CPUS[name].machine,
        model_name=", ".join(f"{implementer:#x}:{part:#x}" for implementer, part in sorted(parts)),
    )


def describe_host(cpu: HostCpu, root: Path = Path("/")) -> Machine:
    """The description of ``cpu`` with the core count, cache sizes and clock that the system under ``root`` reports.

    Raises:
        TargetError: sepc has no kernels for this processor.
    """
    if not cpu.llvm_cpu:
        raise TargetError(
            "sepc has no kernels for the processor of this host",
            where="target='native'",
            why=_why_unsupported(cpu),
            fix="name the machine that will run the model, e.g. target='x86-64-v3'; then this host can only compile",
        )
    machine = Machine.load(cpu.machine_name)
    cores, threads_per_core = count_cores(root)
    caches = read_caches(root, threads_per_core)
    levels = tuple(_as_detected(level, caches, cores, cpu.is_virtual) for level in machine.levels)
    if [level.size_bytes for level in levels[:-1]] != sorted(level.size_bytes for level in levels[:-1]):
        levels = machine.levels  # the system reports nonsense, as some hypervisors do
    machine = replace(machine, name="native", cores=cores, levels=levels)
    clock_ghz = _clock_ghz(cpu, root)
    return machine.with_clock(clock_ghz) if clock_ghz > 0 else machine


def identify(vendor: str, family: int, model: int, flags: frozenset[str]) -> str:
    """LLVM's name of an x86 core, checked against the flags, which a hypervisor may have cut.

    Follows ``llvm/lib/TargetParser/Host.cpp``. An unknown core, or one with less than its level's features, is named by
    its level; one without AVX2 and FMA gets an empty name. Hypervisors also give other model numbers (Rocket Lake's to
    a server with AMX, which has twice its multiply-adds per cycle), and flags that no such core has tell so.
    """
    name = ""
    if vendor in ("AuthenticAMD", "HygonGenuine"):
        name = next((llvm for (fam, models), llvm in _AMD_MODELS if fam == family and model in models), "")
    elif vendor == "GenuineIntel" and (family, model) == _SKYLAKE_SERVER:
        # Three generations share one model number.
        name = "skylake-avx512"
        name = "cascadelake" if "avx512_vnni" in flags else name
        name = "cooperlake" if "avx512_bf16" in flags else name
    elif vendor == "GenuineIntel":
        name = _INTEL_MODELS.get((family, model), "")
        if flags & _SAPPHIRE_RAPIDS_FLAGS and not (name and "avx512fp16" in X86_CPUS[name].features):
            name = "sapphirerapids"
    for candidate in (name, "x86-64-v4", "x86-64-v3"):
        if candidate and _has_level(X86_CPUS[candidate].level, flags):
            return candidate
    return ""


def count_cores(root: Path = Path("/")) -> tuple[int, int]:
    """Physical cores that this process may use, or all of another system's, and hardware threads per core."""
    elsewhere = _read(root / "sys/devices/system/cpu/online") if root != Path("/") else ""
    try:
        processors = numbers_in_list(elsewhere) or sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1, 1
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {_read(root / topology.format(processor)).strip() for processor in processors}
    if "" in siblings:
        return len(processors), 1
    return len(siblings), max(count_in_list(text) for text in siblings)


def read_caches(root: Path = Path("/"), threads_per_core: int = 1) -> dict[str, tuple[int, int, int]]:
    """Data caches of the first processor: level name → (size in bytes, line in bytes, cores that share it)."""
    caches: dict[str, tuple[int, int, int]] = {}
    directory = root / "sys/devices/system/cpu/cpu0/cache"
    for index in range(8):
        entry = directory / f"index{index}"
        if _read(entry / "type").strip() not in ("Data", "Unified"):
            continue
        size_bytes, line_bytes = parse_size(_read(entry / "size")), int(_number(_read(entry / "coherency_line_size")))
        sharing = count_in_list(_read(entry / "shared_cpu_list")) // threads_per_core
        if size_bytes > 0:
            caches[f"L{_read(entry / 'level').strip()}"] = (size_bytes, line_bytes or 64, max(1, sharing))
    return caches


def parse_size(text: str) -> int:
    """Bytes in '48K', '32M' or '512'; 0 for anything else."""
    text = text.strip().upper()
    scale = {"K": 1024, "M": 1024**2, "G": 1024**3}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * scale if digits.isdigit() else 0


def count_in_list(text: str) -> int:
    """How many processors a kernel list names: '0-3,8' are five."""
    return len(numbers_in_list(text))


def numbers_in_list(text: str) -> list[int]:
    """The processors that a kernel list names."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers += range(int(first), (int(last) if last.isdigit() else int(first)) + 1)
    return numbers


def _as_detected(
    level: MemoryLevel, caches: Mapping[str, tuple[int, int, int]], cores: int, is_virtual: bool
) -> MemoryLevel:
    """The level with the system's size and sharing. What the sharers get together keeps its ratio to what one gets.

    A virtual machine with some of the cores that share a cache has neighbours in it: it is taken to hold the geometric
    mean of its share and all. Measured with 2 of 8 cores of Zen 5 (32 MiB): copying 8 MiB 117 GB/s, 16 MiB 78, 24 MiB
    64 and 32 MiB 39 (as DRAM); 12 to 20 MiB that were left alone for 5 ms were read at 50, 3 MiB at 69.
    """
    if level.name not in caches:
        return replace(level, shared_by_cores=min(level.shared_by_cores, cores))
    size_bytes, line_bytes, sharing = caches[level.name]
    shared_by_cores = min(sharing, cores)
    total = level.total_bandwidth_bytes_per_cycle * shared_by_cores / level.shared_by_cores
    if is_virtual and shared_by_cores < level.shared_by_cores:
        size_bytes = round(size_bytes * (shared_by_cores / level.shared_by_cores) ** 0.5)
    return replace(
        level,
        size_bytes=size_bytes,
        line_bytes=line_bytes,
        shared_by_cores=shared_by_cores,
        total_bandwidth_bytes_per_cycle=max(total, level.bandwidth_bytes_per_cycle),
    )


def _clock_ghz(cpu: HostCpu, root: Path) -> float:
    """The clock to assume, 0 for the description's.

    Virtual machines report the time-stamp counter's rate, which is not the core's clock. On bare metal the highest
    frequency is what one busy core gets; the description's figure, which holds for all cores busy, must not exceed it.
    """
    if cpu.is_virtual:
        return 0.0
    highest_ghz = _number(_read(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")) / 1e6
    usual_ghz = Machine.load(cpu.machine_name).clock_ghz
    if highest_ghz > 0:
        return min(highest_ghz, max(usual_ghz, ALL_CORES_PER_HIGHEST_CLOCK * highest_ghz))
    return max(usual_ghz, cpu.reported_clock_ghz)


def _why_unsupported(cpu: HostCpu) -> str:
    if cpu.architecture != "x86-64":
        return f"it is an '{cpu.architecture}', and there are kernels for x86-64 and 64-bit Arm only"
    return f"kernels need AVX2 and FMA, and this processor lacks {', '.join(cpu.lacks(LEVEL_FEATURES[3]))}"


def _has_level(level: int, flags: frozenset[str]) -> bool:
    return all(LINUX_FLAG_OF_FEATURE.get(feature, feature) in flags for feature in LEVEL_FEATURES[level])


def _cpuinfo_fields(block: str) -> dict[str, str]:
    lines = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _hexadecimal(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return 0


def _number(text: str) -> float:
    try:
        return float(text.strip())
    except ValueError:
        return 0.0


# Family and model numbers: llvm/lib/TargetParser/Host.cpp (LLVM 22).
_AMD_MODELS: Final[tuple[tuple[tuple[int, range], str], ...]] = (
    ((0x15, range(0x60, 0x80)), "bdver4"),
    ((0x17, range(0x30, 0x100)), "znver2"),
    ((0x17, range(0x30)), "znver1"),
    ((0x18, range(0x100)), "znver1"),  # Hygon Dhyana
    ((0x19, range(0x10, 0x20)), "znver4"),
    ((0x19, range(0x60, 0x80)), "znver4"),
    ((0x19, range(0xA0, 0xB0)), "znver4"),
    ((0x19, range(0x100)), "znver3"),
    ((0x1A, range(0x100)), "znver5"),
)

# Strix 1 to 3 and Krackan (numbers from Host.cpp, too): 512-bit instructions on 256-bit units (Alexander Yee, 'Zen5's
# AVX512 Teardown').
_ZEN5_MODELS_WITH_256_BIT_UNITS: Final = frozenset([*range(0x20, 0x40), *range(0x60, 0x70)])

_SKYLAKE_SERVER: Final = (6, 0x55)
_SAPPHIRE_RAPIDS_FLAGS: Final = frozenset({"amx_tile", "avx512_fp16"})
"""What Intel's servers have from Sapphire Rapids on, and no earlier core."""
_INTEL_NAMES: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "haswell": ((6, 0x3C), (6, 0x3F), (6, 0x45), (6, 0x46)),
    "broadwell": ((6, 0x3D), (6, 0x47), (6, 0x4F), (6, 0x56)),
    "skylake": ((6, 0x4E), (6, 0x5E), (6, 0x8E), (6, 0x9E), (6, 0xA5), (6, 0xA6)),
    "cannonlake": ((6, 0x66),),
    "icelake-client": ((6, 0x7D), (6, 0x7E)),
    "icelake-server": ((6, 0x6A), (6, 0x6C)),
    "tigerlake": ((6, 0x8C), (6, 0x8D)),
    "rocketlake": ((6, 0xA7),),
    "alderlake": ((6, 0x97), (6, 0x9A)),
    "gracemont": ((6, 0xBE),),
    "raptorlake": ((6, 0xB7), (6, 0xBA), (6, 0xBF)),
    "meteorlake": ((6, 0xAA), (6, 0xAC)),
    "sapphirerapids": ((6, 0x8F),),
    "emeraldrapids": ((6, 0xCF),),
    "graniterapids": ((6, 0xAD),),
    "graniterapids-d": ((6, 0xAE),),
    "arrowlake": ((6, 0xB5), (6, 0xC5)),
    "arrowlake-s": ((6, 0xC6),),
    "lunarlake": ((6, 0xBD),),
    "pantherlake": ((6, 0xCC),),
    "wildcatlake": ((6, 0xD5),),
    "sierraforest": ((6, 0xAF),),
    "grandridge": ((6, 0xB6),),
    "clearwaterforest": ((6, 0xDD),),
    "knl": ((6, 0x57),),
    "knm": ((6, 0x85),),
    "diamondrapids": ((19, 0x01),),
    "novalake": ((18, 0x01), (18, 0x03)),
}
_INTEL_MODELS: Final = {number: name for name, numbers in _INTEL_NAMES.items() for number in numbers}

# Implementer and part numbers: the same file.
_ARM_LIMITED: Final = {
    0xD03: "cortex-a53",
    0xD04: "cortex-a35",
    0xD05: "cortex-a55",
    0xD07: "cortex-a57",
    0xD08: "cortex-a72",
    0xD09: "cortex-a73",
    0xD0A: "cortex-a75",
    0xD0B: "cortex-a76",
    0xD0C: "neoverse-n1",
    0xD0D: "cortex-a77",
    0xD0E: "cortex-a76ae",
    0xD40: "neoverse-v1",
    0xD41: "cortex-a78",
    0xD42: "cortex-a78ae",
    0xD44: "cortex-x1",
    0xD46: "cortex-a510",
    0xD47: "cortex-a710",
    0xD48: "cortex-x2",
    0xD49: "neoverse-n2",
    0xD4A: "neoverse-e1",
    0xD4B: "cortex-a78c",
    0xD4C: "cortex-x1c",
    0xD4D: "cortex-a715",
    0xD4E: "cortex-x3",
    0xD4F: "neoverse-v2",
    0xD80: "cortex-a520",
    0xD81: "cortex-a720",
    0xD82: "cortex-x4",
    0xD84: "neoverse-v3",
    0xD85: "cortex-x925",
    0xD87: "cortex-a725",
    0xD8E: "neoverse-n3",
}
_ARM_PARTS: Final = {
    **{(0x41, part): name for part, name in _ARM_LIMITED.items()},
    **{(0x61, part): "apple-a14" for part in range(0x22, 0x2A)},
    **{(0x61, part): "apple-a15" for part in range(0x32, 0x3A)},
    (0xC0, 0xAC3): "ampere1",
    (0xC0, 0xAC4): "ampere1a",
    (0x51, 0x1): "oryon-1",
    (0x48, 0xD01): "tsv110",
}
