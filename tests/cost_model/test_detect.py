"""Detection of the host, from made-up /proc and /sys trees, and once from the real one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sepc.cost_model import detect
from sepc.cost_model.machine import Machine
from sepc.cost_model.x86_cpus import LEVEL_FEATURES, LINUX_FLAG_OF_FEATURE, X86_CPUS
from sepc.errors import TargetError


def flags_of(level: int, *more: str) -> frozenset[str]:
    return frozenset([LINUX_FLAG_OF_FEATURE.get(name, name) for name in LEVEL_FEATURES[level]] + list(more))


V3, V4 = flags_of(3), flags_of(4)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_host(
    root: Path,
    *,
    vendor: str = "AuthenticAMD",
    family: int = 26,
    model: int = 2,
    flags: frozenset[str] = V4,
    threads: int = 4,
    threads_per_core: int = 2,
    mhz: float = 2596.1,
) -> None:
    """A /proc/cpuinfo and a /sys tree: 48 KiB L1d, 2 MiB L2, 16 MiB L3 shared by all threads."""
    block = (
        "processor\t: {i}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        "model name\t: some: core\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n"
    )
    values = {"vendor": vendor, "family": family, "model": model, "mhz": mhz, "flags": " ".join(sorted(flags))}
    write(root / "proc/cpuinfo", "\n".join(block.format(i=i, **values) for i in range(threads)))
    cpus = root / "sys/devices/system/cpu"
    for i in range(threads):
        first = i // threads_per_core * threads_per_core
        siblings = f"{first}-{first + threads_per_core - 1}" if threads_per_core > 1 else str(first)
        write(cpus / f"cpu{i}/topology/thread_siblings_list", siblings + "\n")
    own = f"0-{threads_per_core - 1}"
    caches = [(1, "Data", "48K", own), (1, "Instruction", "32K", own), (2, "Unified", "2048K", own)]
    caches.append((3, "Unified", "16M", f"0-{threads - 1}"))
    for index, (level, kind, size, shared) in enumerate(caches):
        entry = cpus / f"cpu0/cache/index{index}"
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
            write(entry / name, f"{text}\n")
        write(entry / "coherency_line_size", "64\n")


@pytest.fixture(autouse=True)
def _four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


def describe(root: Path, architecture: str = "x86_64") -> Machine:
    return detect.describe_host(detect.read_host_cpu(root, architecture), root)


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "expected"),
    [
        ("AuthenticAMD", 26, 0x02, V4, "znver5"),
        ("AuthenticAMD", 26, 0x44, V4, "znver5"),
        ("AuthenticAMD", 25, 0x01, V3, "znver3"),  # Milan
        ("AuthenticAMD", 25, 0x21, V3, "znver3"),  # Vermeer
        ("AuthenticAMD", 25, 0x50, V3, "znver3"),  # Cezanne
        ("AuthenticAMD", 25, 0x11, V4, "znver4"),  # Genoa
        ("AuthenticAMD", 25, 0x61, V4, "znver4"),  # Raphael
        ("AuthenticAMD", 25, 0x74, V4, "znver4"),  # Phoenix
        ("AuthenticAMD", 25, 0xA0, V4, "znver4"),  # Bergamo
        ("AuthenticAMD", 23, 0x01, V3, "znver1"),
        ("AuthenticAMD", 23, 0x31, V3, "znver2"),  # Rome
        ("AuthenticAMD", 23, 0x71, V3, "znver2"),
        ("HygonGenuine", 24, 0x00, V3, "znver1"),
        ("GenuineIntel", 6, 0x55, V4, "skylake-avx512"),
        ("GenuineIntel", 6, 0x55, V4 | {"avx512_vnni"}, "cascadelake"),
        ("GenuineIntel", 6, 0x55, V4 | {"avx512_vnni", "avx512_bf16"}, "cooperlake"),
        ("GenuineIntel", 6, 0x6A, V4, "icelake-server"),
        ("GenuineIntel", 6, 0x8F, V4, "sapphirerapids"),
        ("GenuineIntel", 6, 0xCF, V4, "emeraldrapids"),
        ("GenuineIntel", 6, 0x3F, V3, "haswell"),
        ("GenuineIntel", 6, 0x4F, V3, "broadwell"),
        ("GenuineIntel", 6, 0x9E, V3, "skylake"),
        ("GenuineIntel", 6, 0x97, V3, "alderlake"),
        # unknown cores, and hypervisors that cut features or give other numbers
        ("GenuineIntel", 6, 0xA7, V4, "rocketlake"),
        ("GenuineIntel", 6, 0xA7, V4 | {"avx512_fp16"}, "sapphirerapids"),
        ("GenuineIntel", 6, 0xFE, V4 | {"amx_tile"}, "sapphirerapids"),
        ("GenuineIntel", 6, 0xCF, V4 | {"amx_tile", "avx512_fp16"}, "emeraldrapids"),
        ("GenuineIntel", 6, 0xA7, V3 | {"amx_tile"}, "x86-64-v3"),
        ("GenuineIntel", 6, 0xFE, V4, "x86-64-v4"),
        ("GenuineIntel", 6, 0xFE, V3, "x86-64-v3"),
        ("AuthenticAMD", 99, 0, V4, "x86-64-v4"),
        ("SomebodyElse", 6, 0x55, V3, "x86-64-v3"),
        ("AuthenticAMD", 26, 2, V3, "x86-64-v3"),
        ("GenuineIntel", 6, 0x55, V3, "x86-64-v3"),
        ("GenuineIntel", 6, 0x3F, V3 - {"fma"}, ""),
    ],
)
def test_identify(vendor: str, family: int, model: int, flags: frozenset[str], expected: str) -> None:
    assert detect.identify(vendor, family, model, flags) == expected


def test_every_name_that_identify_can_give_is_known() -> None:
    names = {name for _, name in detect._AMD_MODELS} | set(detect._INTEL_NAMES)
    assert names <= set(X86_CPUS)


def test_sizes_and_cores_are_the_hosts_and_the_rest_is_the_descriptions(tmp_path: Path) -> None:
    write_host(tmp_path, flags=V4 | {"hypervisor"})
    machine, known = describe(tmp_path), Machine.load("znver5")
    assert machine.name == "native"
    assert machine.cores == 2
    # Two cores of eight, with neighbours: the last cache counts for half of its 16 MiB.
    assert [level.size_bytes for level in machine.levels] == [48 * 2**10, 2 * 2**20, 8 * 2**20, 0]
    assert [level.shared_by_cores for level in machine.levels] == [1, 1, 2, 2]
    assert machine.fma_per_cycle == known.fma_per_cycle
    assert machine.last_cache.bandwidth_bytes_per_cycle == known.last_cache.bandwidth_bytes_per_cycle
    assert machine.last_cache.total_bandwidth_bytes_per_cycle == pytest.approx(190 * 2 / 8)
    assert machine.dram == known.dram.__class__(**(vars(known.dram) | {"shared_by_cores": 2}))


def test_without_neighbours_the_last_cache_is_the_hosts_own(tmp_path: Path) -> None:
    write_host(tmp_path, flags=V4)
    assert describe(tmp_path).last_cache.size_bytes == 16 * 2**20


def test_a_virtual_machines_reported_clock_is_not_believed(tmp_path: Path) -> None:
    write_host(tmp_path, flags=V4 | {"hypervisor"}, mhz=2596.1)
    assert describe(tmp_path).clock_ghz == Machine.load("znver5").clock_ghz


@pytest.mark.parametrize(
    ("highest_khz", "mhz", "expected_ghz"),
    [
        ("5000000", 1500.0, 4.25),  # one core reaches 5.0; all of them about 0.85 of that
        ("4200000", 1500.0, 4.0),
        ("3000000", 1500.0, 3.0),
        ("", 4300.0, 4.3),
        ("", 1500.0, 4.0),
    ],
)
def test_clock_on_bare_metal(tmp_path: Path, highest_khz: str, mhz: float, expected_ghz: float) -> None:
    write_host(tmp_path, mhz=mhz)
    write(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", highest_khz)
    assert describe(tmp_path).clock_ghz == pytest.approx(expected_ghz)


def test_threads_of_a_core_count_once_and_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_host(tmp_path)
    assert detect.count_cores(tmp_path) == (2, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3}, raising=False)
    assert detect.count_cores(tmp_path) == (1, 2)
    assert describe(tmp_path).last_cache.shared_by_cores == 1


def test_mobile_zen5_has_the_units_of_zen4(tmp_path: Path) -> None:
    write_host(tmp_path, model=0x24)
    cpu = detect.read_host_cpu(tmp_path, "x86_64")
    assert (cpu.llvm_cpu, cpu.machine_name) == ("znver5", "znver4")


def test_without_sysfs_the_description_stands(tmp_path: Path) -> None:
    write_host(tmp_path, flags=V4 | {"hypervisor"}, threads=1)
    cpu = detect.read_host_cpu(tmp_path, "x86_64")
    machine = detect.describe_host(cpu, tmp_path / "nowhere")
    assert machine.cores == 4
    assert machine.last_cache.size_bytes == Machine.load("znver5").last_cache.size_bytes


def test_nonsensical_cache_sizes_are_ignored(tmp_path: Path) -> None:
    write_host(tmp_path)
    write(tmp_path / "sys/devices/system/cpu/cpu0/cache/index2/size", "1K")
    assert describe(tmp_path).levels[1].size_bytes == Machine.load("znver5").levels[1].size_bytes


def test_not_linux_falls_back_to_the_generic_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    cpu = detect.read_host_cpu(tmp_path, "AMD64")
    assert (cpu.llvm_cpu, cpu.flags) == ("x86-64-v3", None)
    machine = detect.describe_host(cpu, tmp_path)
    assert machine.cores == 6
    assert machine.vector_bits == 256


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no kernels for the processor(.|\n)*'riscv64'(.|\n)*name the machine"):
        describe(tmp_path, "riscv64")


ARM_FLAGS = "fp asimd evtstrm crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


@pytest.mark.parametrize(
    ("parts", "flags", "llvm_cpu", "machine"),
    [
        ([(0x41, 0xD08)], "fp asimd", "cortex-a72", "cortex-a72"),
        ([(0x41, 0xD05), (0x41, 0xD0B)], ARM_FLAGS, "cortex-a76", "cortex-a76"),  # small cores first
        ([(0x41, 0xD0C)], ARM_FLAGS, "neoverse-n1", "neoverse-n1"),
        ([(0x41, 0xD0C)], "fp asimd", "generic", "cortex-a72"),  # a hypervisor hides what LLVM would use
        ([(0x61, 0x23)], ARM_FLAGS, "apple-a14", "apple-m1"),
        ([(0x99, 0x99)], ARM_FLAGS, "generic", "cortex-a72"),
    ],
)
def test_arm_cores_are_known_by_their_parts(
    tmp_path: Path, parts: list[tuple[int, int]], flags: str, llvm_cpu: str, machine: str
) -> None:
    blocks = [
        f"processor\t: {i}\nFeatures\t: {flags}\nCPU implementer\t: {a:#x}\nCPU part\t: {b:#x}\n"
        for i, (a, b) in enumerate(parts)
    ]
    write(tmp_path / "proc/cpuinfo", "\n".join(blocks))
    cpu = detect.read_host_cpu(tmp_path, "aarch64")
    assert (cpu.architecture, cpu.llvm_cpu, cpu.machine_name) == ("aarch64", llvm_cpu, machine)
    assert describe(tmp_path, "aarch64").vector_lanes == 4


def test_a_mac_without_cpuinfo_has_at_least_an_m1(tmp_path: Path) -> None:
    cpu = detect.read_host_cpu(tmp_path, "arm64")
    assert (cpu.architecture, cpu.llvm_cpu, cpu.flags, cpu.machine_name) == ("aarch64", "apple-a14", None, "apple-m1")


def test_an_old_processor_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    write_host(tmp_path, flags=V3 - {"fma", "avx2"})
    with pytest.raises(TargetError, match="lacks avx2, fma"):
        describe(tmp_path)


@pytest.mark.parametrize(("text", "size"), [("48K\n", 49152), ("32M", 2**25), ("512", 512), ("", 0), ("much", 0)])
def test_parse_size(text: str, size: int) -> None:
    assert detect.parse_size(text) == size


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-3", 4), ("0-3,8", 5), ("0,32", 2), ("", 0), ("x", 0)])
def test_count_in_list(text: str, count: int) -> None:
    assert detect.count_in_list(text) == count


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not Linux")
def test_the_real_host_is_detected_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    durations_ms = []
    for _ in range(5):
        detect.host_cpu.cache_clear()
        start = time.perf_counter()
        cpu = detect.host_cpu()
        if not cpu.llvm_cpu:
            pytest.skip(f"no kernels for this host: {cpu.architecture}")
        machine = detect.detect_host()
        durations_ms.append((time.perf_counter() - start) * 1e3)
    assert machine.cores >= 1
    assert min(durations_ms) < 10
