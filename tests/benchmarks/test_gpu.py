"""The table of what kernels take on GPUs, without compiling any."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu
from sepc.runtime.gpu import Resources
from sepc.runtime.report import RegionReport


def region(name: str, kernel: str, *resources: Resources) -> RegionReport:
    return RegionReport(name, "convolution", (), kernel, "", "a tiling", 1.0, "DRAM", 1, 1, (), resources)


@pytest.mark.parametrize(("spilled_bytes", "status"), [(0, 0), (8, 1)])
def test_a_kernel_that_spills_is_a_failure(
    spilled_bytes: int, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    regions = (
        region("first", "sepc", Resources(64, 0, 2048, 0.5)),
        region("second", "sepc", Resources(96, spilled_bytes, 4096, 0.25)),
        region("third", "torch"),
    )
    monkeypatch.setattr(gpu, "compile_for", lambda model, architecture, *_: gpu.Compiled(model, architecture, regions))
    written = tmp_path / "table.txt"
    assert gpu.main(["net", "--architecture", "sm_80", "--output", str(written)]) == status
    head, row, *_, last = written.read_text().rstrip().splitlines()
    assert head.split()[:3] == ["model", "target", "kernels"]
    assert row.split() == ["net", "sm_80", "2", "1", str(int(spilled_bytes > 0)), "96", "4.0", "38%", "25%"]
    assert last.startswith("  second")
    assert "96 registers" in last
