"""Calibration: what is measured, how it is kept, and that nothing but this processor's own sound file is used."""

from __future__ import annotations

import json
import logging
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sepc
from sepc.backends.rpc import Board
from sepc.cost_model import calibrate, calibration, detect
from sepc.cost_model.calibration import FILE_NAME, LevelRates, Measurements, calibrated, store, with_stored
from sepc.cost_model.machine import Machine
from sepc.target import Target
from tests.rpc import needs_rpc, server, tracker

ZEN5 = replace(Machine.load("znver5"), cores=8)
MEASURED = Measurements(
    clock_ghz=4.1,
    fma_per_ns=8.0,
    levels=(
        LevelRates(500.0, 250.0, 4000.0),
        LevelRates(220.0, 200.0, 1760.0),
        LevelRates(100.0, 90.0, 640.0),
        LevelRates(40.0, 30.0, 60.0),
    ),
    parallel_region_us=0.7,
    barrier_us=0.3,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that does not exist yet."""
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path / "own" / "cache"))
    return tmp_path / "own" / "cache"


# ---- measurements → machine


def test_measured_figures_replace_those_of_the_description() -> None:
    machine = calibrated(ZEN5, MEASURED)
    assert machine.fma_per_cycle == 2
    assert machine.clock_ghz == pytest.approx(4.0)  # 8 vectors per ns at 2 per cycle
    assert machine.peak_flops_per_core == pytest.approx(2 * 16 * 8e9)
    assert [level.bandwidth_bytes_per_cycle for level in machine.levels] == pytest.approx([125, 55, 25, 10])
    assert [level.write_bandwidth_bytes_per_cycle for level in machine.levels] == pytest.approx([62.5, 50, 22.5, 7.5])
    assert [level.total_bandwidth_bytes_per_cycle for level in machine.levels] == pytest.approx([125, 55, 160, 15])
    assert (machine.parallel_region_us, machine.barrier_us) == (0.7, 0.3)
    assert (machine.fma_latency_cycles, machine.loads_per_cycle) == (ZEN5.fma_latency_cycles, ZEN5.loads_per_cycle)
    assert [level.size_bytes for level in machine.levels] == [level.size_bytes for level in ZEN5.levels]


def test_units_that_the_description_does_not_know_of_are_found() -> None:
    generic = replace(Machine.load("x86-64-v4"), cores=8)
    assert generic.fma_per_cycle == 1
    assert calibrated(generic, MEASURED).fma_per_cycle == 2


def test_a_disturbed_measurement_makes_no_level_faster_than_the_one_before() -> None:
    levels = (LevelRates(500.0, 250.0, 4000.0), *[LevelRates(600.0, 90.0, 1.0)] * 3)
    machine = calibrated(ZEN5, replace(MEASURED, levels=levels))
    assert {level.bandwidth_bytes_per_cycle for level in machine.levels} == {125.0}
    for level in machine.levels:
        assert level.total_bandwidth_bytes_per_cycle >= level.bandwidth_bytes_per_cycle


def test_what_several_caches_deliver_together_is_shared_out() -> None:
    two_dies = replace(ZEN5, cores=16)
    assert calibrated(two_dies, MEASURED).last_cache.total_bandwidth_bytes_per_cycle == pytest.approx(80)


@pytest.mark.parametrize("name", ["znver5", "skylake-avx512", "x86-64-v3"])
def test_working_sets_lie_in_their_levels(name: str) -> None:
    machine = Machine.load(name)
    sizes = calibrate.working_sets(machine)
    own = [level.size_per_core_bytes(machine.cores) for level in machine.levels[:-1]]
    assert len(sizes) == len(machine.levels)
    assert all(size < capacity for size, capacity in zip(sizes, own, strict=False))
    assert sizes[1] > own[0]
    assert sizes[-1] >= 2 * machine.last_cache.size_bytes


# ---- storage


def test_what_is_stored_is_found_again(cache: Path) -> None:
    path = store(MEASURED, ZEN5, "cpu")
    assert path == cache / FILE_NAME
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert list(cache.iterdir()) == [path]  # no temporary file is left
    assert with_stored(ZEN5, "cpu") == calibrated(ZEN5, MEASURED)
    assert Measurements.of(asdict(MEASURED)) == MEASURED


def test_without_a_file_the_description_stands_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert with_stored(ZEN5, "cpu") is ZEN5
    assert not caplog.records


def ignored(caplog: pytest.LogCaptureFixture, machine: Machine = ZEN5, cpu_name: str = "cpu") -> str:
    """The one line that says why the stored file is ignored."""
    with caplog.at_level(logging.INFO):
        assert with_stored(machine, cpu_name) is machine
    (record,) = caplog.records
    return record.getMessage()


@pytest.mark.parametrize(
    ("machine", "cpu_name"),
    [(ZEN5, "another cpu"), (replace(ZEN5, cores=4), "cpu"), (replace(ZEN5, vector_bits=256), "cpu")],
)
def test_a_file_of_another_processor_is_ignored(
    machine: Machine, cpu_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    store(MEASURED, ZEN5, "cpu")
    assert "of another processor" in ignored(caplog, machine, cpu_name)


def _another_format(content: dict[str, Any]) -> None:
    content["format"] += 1


def _no_host(content: dict[str, Any]) -> None:
    del content["host"]


def _no_clock(content: dict[str, Any]) -> None:
    del content["measured"]["clock_ghz"]


def _negative(content: dict[str, Any]) -> None:
    content["measured"]["barrier_us"] = -1.0


def _text(content: dict[str, Any]) -> None:
    content["measured"]["fma_per_ns"] = "fast"


def _not_finite(content: dict[str, Any]) -> None:
    content["measured"]["levels"][0]["read_gb_per_s"] = float("nan")


def _too_few_levels(content: dict[str, Any]) -> None:
    content["measured"]["levels"].pop()


@pytest.mark.parametrize(
    "spoil", [_another_format, _no_host, _no_clock, _negative, _text, _not_finite, _too_few_levels]
)
def test_a_file_that_makes_no_sense_is_ignored(spoil: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = store(MEASURED, ZEN5, "cpu")
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    assert "sepc.calibrate() renews it" in ignored(caplog)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}'])
def test_a_damaged_file_is_ignored(data: bytes, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir(parents=True)
    (cache / FILE_NAME).write_bytes(data)
    assert "damaged" in ignored(caplog)


def test_the_place_is_the_users_cache_unless_named(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert calibration.cache_directory() == cache
    monkeypatch.delenv("SEPC_CACHE_DIR")
    assert calibration.cache_directory().name == "sepc"


# ---- the whole


def test_native_means_the_calibrated_host(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect.describe_host(detect.host_cpu())
    levels = MEASURED.levels[: len(machine.levels)]
    monkeypatch.setattr(calibrate, "measure", lambda machine: replace(MEASURED, levels=levels))
    found = sepc.calibrate()
    assert found.barrier_us == MEASURED.barrier_us
    assert detect.detect_host() == Target.parse("native").machine == found


@needs_rpc
def test_devices_behind_a_tracker_are_measured_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SAMPLE_SECONDS", 0.002)
    monkeypatch.setattr(calibrate, "SAMPLES", 3)
    monkeypatch.setattr(calibrate, "working_sets", lambda machine: [4096] * len(machine.levels))
    together: list[tuple[float, float]] = []
    execute = Board.execute

    def noted(*arguments: Any) -> str:
        start = time.monotonic()
        text = execute(*arguments)
        together.append((start, time.monotonic()))
        return text

    monkeypatch.setattr(Board, "execute", noted)
    with tracker() as one, server(one, "board"), server(one, "board"):
        remote = sepc.remote(one.address, key="board", timeout_s=120)
        machine = sepc.calibrate(runner=remote)
        remote.close()
    (first, first_end), (second, second_end) = together
    assert second < first_end
    assert first < second_end
    described = detect.describe_host(detect.host_cpu())
    assert [level.size_bytes for level in machine.levels] == [level.size_bytes for level in described.levels]
    assert machine != described
    assert 0.5 < machine.clock_ghz < 7
    assert not cache.exists()  # That is for this host's own figures.
    assert Target.parse("x86-64-v3").with_machine(machine).machine == machine


def test_of_several_measurements_the_best_counts() -> None:
    slow = replace(MEASURED, clock_ghz=3.0, barrier_us=9.0, levels=(LevelRates(1.0, 999.0, 2.0), *MEASURED.levels[1:]))
    found = calibrate.best([MEASURED, slow])
    assert found == replace(MEASURED, levels=(LevelRates(500.0, 999.0, 4000.0), *MEASURED.levels[1:]))


class Devices:
    """Devices that print what they are told."""

    def __init__(self, *printed: tuple[str, str]) -> None:
        self.printed = printed

    @contextmanager
    def boards(self) -> Iterator[list[Any]]:
        yield [
            SimpleNamespace(
                address=f"board {number}",
                cpu=lambda target, name=name: replace(detect.host_cpu(), model_name=name),
                machine=lambda target: detect.describe_host(detect.host_cpu()),
                execute=lambda *arguments, text=text: text,
            )
            for number, (name, text) in enumerate(self.printed)
        ]


def test_devices_of_two_kinds_are_refused() -> None:
    with pytest.raises(sepc.TargetError, match=r"not of one kind(.|\n)*board 0 is (.|\n)*: a, board 1 is (.|\n)*: b"):
        sepc.calibrate(runner=Devices(("a", ""), ("b", "")))


def test_a_device_that_prints_something_else_is_told() -> None:
    with pytest.raises(sepc.BuildError, match=r"has printed 'clock_ghz 3\.0"):
        sepc.calibrate(runner=Devices(("a", "clock_ghz 3.0\nfma_per_ns 6.0\n")))


def test_a_program_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text("this is no C")
    monkeypatch.setattr(calibrate, "SOURCE", source)
    with pytest.raises(sepc.BuildError, match=r"could not be measured[\s\S]*without calibration"):
        calibrate.measure(ZEN5)


def test_a_short_measurement_of_this_host_is_plausible() -> None:
    described = detect.describe_host(detect.host_cpu())
    measured = calibrate.measure(described, sample_seconds=0.002, samples=3)
    machine = calibrated(described, measured)
    assert 0.5 < machine.clock_ghz < 7
    assert 0.5 <= machine.fma_per_cycle <= 4
    first, *_, dram = machine.levels
    assert 4 <= first.bandwidth_bytes_per_cycle <= 256
    assert 1 <= dram.bandwidth_bytes_per_cycle * machine.clock_ghz <= 500  # GB/s
    assert dram.bandwidth_bytes_per_cycle < first.bandwidth_bytes_per_cycle
    assert 0.01 < machine.barrier_us < 10_000
