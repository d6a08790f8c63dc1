"""Models on several devices at once, with descriptions and with what was measured."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import sepc
from benchmarks import devices
from sepc.cost_model.detect import describe_host, host_cpu
from tests.rpc import needs_rpc, server, tracker


@needs_rpc
@pytest.mark.slow
def test_models_are_shared_out_among_the_devices_behind_a_tracker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = replace(describe_host(host_cpu()), clock_ghz=1.0)
    monkeypatch.setattr(sepc, "calibrate", lambda **options: measured)
    names = ["mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv2_050"]
    with tracker() as one, server(one, "box") as first, server(one, "box") as second:
        options = ["--key", "box", "--target", "x86-64-v3", "--size", "32", "--models", *names]
        assert devices.main([one.address, *options]) == 0
        ports = {first.port, second.port}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 device(s), target x86-64-v3")
    assert [line.split()[0] for line in lines[2:]] == names
    assert ports
    for line in lines[2:]:
        numbers = [float(one) for one in re.findall(r"\d+\.\d+(?=\s)", line)]
        assert len(numbers) == 7
        assert all(number > 0 for number in numbers)


def test_a_row_tells_ratios_and_the_gain() -> None:
    row = devices.Row("net", "rpi", devices.Timed(1000.0, 3000.0), devices.Timed(2000.0, 2500.0))
    assert row.described.ratio == 3.0
    assert str(row).split() == ["net", "1.00", "3.00", "3.00", "2.00", "2.50", "1.25", "1.200", "rpi"]
