"""Machine descriptions: all load, their peaks are the manuals', and a wrong file says what is wrong."""

from __future__ import annotations

import math
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from sepc.cost_model.cpus import CPUS
from sepc.cost_model.machine import MACHINES_DIRECTORY, Machine, parse_machine
from sepc.errors import TargetError

WITHOUT_THIRD_LEVEL = ("apple-m1", "cortex-a53", "cortex-a72")


def _table() -> dict[str, Any]:
    return tomllib.loads((MACHINES_DIRECTORY / "znver5.toml").read_text())


@pytest.mark.parametrize("name", Machine.known())
def test_every_description_loads(name: str) -> None:
    machine = Machine.load(name)
    assert machine.name == name
    caches = ["L1", "L2"] if name in WITHOUT_THIRD_LEVEL else ["L1", "L2", "L3"]
    assert [level.name for level in machine.levels] == [*caches, "DRAM"]
    reads = [level.bandwidth_bytes_per_cycle for level in machine.levels]
    assert reads == sorted(reads, reverse=True)
    for level in machine.levels:
        assert 1 <= level.shared_by_cores <= machine.cores
        assert level.total_bandwidth_bytes_per_cycle >= level.bandwidth_bytes_per_cycle
        assert level.write_bandwidth_bytes_per_cycle > 0
    assert machine.levels[0].bandwidth_bytes_per_cycle <= machine.loads_per_cycle * machine.vector_bits / 8
    assert machine.vector_registers == (16 if machine.vector_bits == 256 else 32)
    assert machine.architecture == ("aarch64" if machine.vector_bits == 128 else "x86-64")


@pytest.mark.parametrize("name", Machine.known())
def test_every_description_states_sources(name: str) -> None:
    text = (MACHINES_DIRECTORY / f"{name}.toml").read_text()
    for part in text.split("[[levels]]"):
        assert "#" in part


def test_every_core_has_a_description_of_its_width() -> None:
    for cpu in CPUS.values():
        machine = Machine.load(cpu.machine)
        assert (machine.vector_bits, machine.architecture) == (cpu.vector_bits, cpu.architecture), cpu.name


@pytest.mark.parametrize(
    ("name", "flops_per_cycle"),
    [
        ("haswell", 32),
        ("znver3", 32),
        ("znver4", 32),  # 512-bit instructions on 256-bit units
        ("znver5", 64),
        ("skylake-avx512", 64),
        ("sapphirerapids", 64),
        ("x86-64-v3", 32),
        ("x86-64-v4", 32),
        ("cortex-a53", 8),
        ("cortex-a72", 8),
        ("cortex-a76", 16),
        ("neoverse-n1", 16),
        ("neoverse-v1", 32),
        ("apple-m1", 32),
    ],
)
def test_peak_is_that_of_the_manuals(name: str, flops_per_cycle: int) -> None:
    machine = Machine.load(name)
    assert machine.flops_per_cycle == flops_per_cycle
    assert machine.peak_flops_per_core == pytest.approx(flops_per_cycle * machine.clock_ghz * 1e9)


def test_narrow_vectors_run_at_the_rate_of_the_units() -> None:
    zen4, zen5 = Machine.load("znver4"), Machine.load("znver5")
    assert (zen4.fma_per_cycle_at(16), zen4.fma_per_cycle_at(8), zen4.fma_per_cycle_at(4)) == (1, 2, 2)
    assert (zen4.loads_per_cycle_at(16), zen4.loads_per_cycle_at(1)) == (1, 2)
    assert zen5.fma_per_cycle_at(16) == zen5.fma_per_cycle_at(8) == 2


def test_properties() -> None:
    machine = Machine.load("znver5")
    assert machine.vector_lanes == 16
    assert machine.cycles_to_us(4000) == pytest.approx(1.0)
    assert machine.dram.is_unbounded
    assert machine.last_cache.name == "L3"
    assert machine.level("L2") is machine.levels[1]
    assert machine.level("L4") is None
    assert hash(machine) == hash(Machine.load("znver5"))


def test_sharing() -> None:
    level = Machine.load("znver5").last_cache
    assert level.size_per_core_bytes(1) == 32 * 2**20
    assert level.size_per_core_bytes(4) == 8 * 2**20
    assert level.size_per_core_bytes(16) == 4 * 2**20
    assert level.combined_bandwidth_bytes_per_cycle(1) == 27
    assert level.combined_bandwidth_bytes_per_cycle(8) == 190
    assert level.combined_bandwidth_bytes_per_cycle(9) == 190 + 27
    assert level.combined_write_bandwidth_bytes_per_cycle(8) == pytest.approx(190 * 25 / 27)
    assert math.isinf(Machine.load("znver5").dram.size_per_core_bytes(3))


def test_another_clock_leaves_dram_its_bytes_per_second() -> None:
    machine = Machine.load("znver5")
    slower = machine.with_clock(2.0)
    assert slower.dram.bandwidth_bytes_per_cycle * 2.0 == pytest.approx(machine.dram.bandwidth_bytes_per_cycle * 4.0)
    assert slower.last_cache == machine.last_cache


def test_unknown_machine_names_the_known_and_the_near() -> None:
    with pytest.raises(TargetError, match=r"no machine description 'znver6'(.|\n)*haswell(.|\n)*did you mean 'znver5'"):
        Machine.load("znver6")
    with pytest.raises(TargetError, match=r"add qqqq\.toml to machines/"):
        Machine.load("qqqq")


def _drop_clock(table: dict[str, Any]) -> None:
    del table["clock_ghz"]


def _unknown_key(table: dict[str, Any]) -> None:
    table["colour"] = "red"


def _unknown_level_key(table: dict[str, Any]) -> None:
    table["levels"][0]["colour"] = "red"


def _no_dram(table: dict[str, Any]) -> None:
    table["levels"].pop()


def _shrinking(table: dict[str, Any]) -> None:
    table["levels"][1]["size_kib"] = 1


def _no_cores(table: dict[str, Any]) -> None:
    table["cores"] = 0


def _not_a_number(table: dict[str, Any]) -> None:
    table["fma_per_cycle"] = "two"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_drop_clock, "the key 'clock_ghz' is missing"),
        (_unknown_key, "colour"),
        (_unknown_level_key, "level L1 has unknown keys: colour"),
        (_no_dram, "must be DRAM, with size 0"),
        (_shrinking, "cache sizes must be positive and grow"),
        (_no_cores, "must be positive"),
        (_not_a_number, "two"),
    ],
)
def test_malformed_description_says_what_is_wrong(spoil: Any, why: str) -> None:
    table = _table()
    spoil(table)
    with pytest.raises(TargetError, match=rf"'test' is malformed(.|\n)*machines/test\.toml(.|\n)*{why}"):
        parse_machine("test", table)


def test_importing_needs_neither_tvm_nor_torch() -> None:
    program = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('sepc')\n"
        "package.__path__ = [str(pathlib.Path(sys.argv[1]))]\n"
        "sys.modules['sepc'] = package\n"  # the package's own __init__ may import torch
        "import sepc.cost_model.detect\n"
        "assert not {'tvm', 'torch', 'numpy'} & set(sys.modules), 'imported a heavy package'\n"
    )
    package = MACHINES_DIRECTORY.parent.parent
    subprocess.run([sys.executable, "-c", program, str(package)], check=True)


def test_strips_are_slower_behind_the_second_level_and_cores_together_no_faster_than_in_order() -> None:
    for name in Machine.known():
        for index, level in enumerate(Machine.load(name).levels):
            in_order, strips = level.read_cycles(1e6, 0, 1), level.read_cycles(0, 1e6, 1)
            assert strips == in_order if index < 2 else strips > in_order
            assert level.write_cycles(0, 1e6, 1) >= level.write_cycles(1e6, 0, 1)
            assert level.read_cycles(0, 1e6, 8) >= level.read_cycles(1e6, 0, 8)
    assert Machine.load("znver5").dram.strip_bandwidth_bytes_per_cycle == pytest.approx(11 / 4)
