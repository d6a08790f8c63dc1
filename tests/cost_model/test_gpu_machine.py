"""Descriptions of GPUs: all load, their peaks are the data sheets', and a wrong file says what is wrong."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from sepc.cost_model.gpu_machine import GpuMachine, parse_gpu
from sepc.cost_model.machine import MACHINES_DIRECTORY, Machine, descriptions
from sepc.errors import TargetError


def _table(**changes: Any) -> dict[str, Any]:
    return tomllib.loads((MACHINES_DIRECTORY / "sm_80.toml").read_text()) | changes


def test_every_description_is_of_a_cpu_or_of_a_gpu() -> None:
    assert GpuMachine.known() == ("opencl", "sm_75", "sm_75_gtx_1660", "sm_80", "sm_86", "sm_87", "sm_90")
    assert set(Machine.known()) | set(GpuMachine.known()) == set(descriptions())
    assert not set(Machine.known()) & set(GpuMachine.known())


@pytest.mark.parametrize("name", GpuMachine.known())
def test_every_description_loads_and_states_sources(name: str) -> None:
    machine = GpuMachine.load(name)
    assert (machine.name, machine.warp_size) == (name, 32)
    assert name.startswith(machine.architecture)
    assert machine.warps * machine.warp_size >= machine.threads_per_block
    delivered = machine.shared_bytes_per_cycle * machine.multiprocessors
    assert delivered >= machine.l2_bytes_per_cycle > machine.dram_bytes_per_cycle
    assert (MACHINES_DIRECTORY / f"{name}.toml").read_text().count("#") > 8


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("sm_75", 8.1), ("sm_75_gtx_1660", 5.0), ("sm_80", 19.5), ("sm_86", 19.2), ("sm_87", 5.3), ("sm_90", 59.3)],
)
def test_peak_is_that_of_the_data_sheets(name: str, teraflops: float) -> None:
    # For sm_90 at the clock that is assumed; the sheet's 67 are at 1.98 GHz.
    assert GpuMachine.load(name).peak_flops == pytest.approx(teraflops * 1e12, rel=0.02)


@pytest.mark.parametrize(
    ("threads", "registers", "shared_bytes", "blocks"),
    [
        (256, 32, 0, 8),  # warps: 64 / 8
        (32, 32, 0, 32),  # blocks
        (256, 255, 0, 1),  # registers: 65536 / (255 · 256)
        (256, 32, 48 * 1024, 3),  # shared memory: 164 / 48
        (1024, 65, 0, 0),  # more registers than there are
        (2048, 32, 0, 0),
        (256, 256, 0, 0),
        (256, 32, 164 * 1024, 0),
    ],
)
def test_resident_blocks(threads: int, registers: int, shared_bytes: int, blocks: int) -> None:
    assert GpuMachine.load("sm_80").resident_blocks(threads, registers, shared_bytes) == blocks


def test_unknown_gpu_names_the_known_and_the_near() -> None:
    with pytest.raises(
        TargetError, match=r"no machine description 'sm_88'(.|\n)*sm_75, sm_75_gtx_1660, sm_80(.|\n)*did you mean"
    ):
        GpuMachine.load("sm_88")
    with pytest.raises(TargetError, match="no machine description 'znver5'"):
        GpuMachine.load("znver5")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"colour": "red"}, "colour"),
        ({"warps": 0}, "must be positive"),
        ({"dram_gb_per_s": "much"}, "much"),
        ({"shared_kib_per_block": 200}, "must fit"),
    ],
)
def test_malformed_description_says_what_is_wrong(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(TargetError, match=rf"'sm_1' is malformed(.|\n)*{why}(.|\n)*sm_80\.toml; .*gpu_machine\.py"):
        parse_gpu("sm_1", _table(**changes))


def test_a_missing_key_is_named() -> None:
    for key in ("l2_kib", "dram_gb_per_s"):
        table = _table()
        del table[key]
        with pytest.raises(TargetError, match=rf"missing.*'{key}'|'{key}' is missing"):
            parse_gpu("sm_1", table)
