"""The benchmark of float16 builds and runs bundles, and tells what is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import float16
from tests.bundle.test_emulation import needs_tools


@needs_tools
def test_errors_and_sizes_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 9))
    load = SimpleNamespace(load=lambda name, size: (model.eval(), (torch.randn(1, 3, size, size),)), DEFAULT_SIZE=32)
    monkeypatch.setattr(float16, "models", load)
    assert float16.main(["net", "--size", "17", "--output", str(tmp_path)]) == 0
    wide, narrow = (tmp_path / "float16.txt").read_text().splitlines()
    assert wide.startswith("arm64:cortex-a76  net")
    assert "float32  error" in wide
    assert "float16  error" in narrow
    assert narrow in capsys.readouterr().out
    monkeypatch.setattr(float16, "TOLERANCES", {"float16": 1e-9})
    assert float16.main(["net", "--output", str(tmp_path)]) == 1
