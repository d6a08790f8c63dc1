"""What is exported for NVIDIA's GPUs: complete, and C that compiles without a warning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc.bundle import cuda as bundle
from sepc.errors import TargetError
from tests.gpus import needs_nvcc

IMAGE = torch.randn(1, 4, 8, 8)


@pytest.fixture(scope="module")
def compiled() -> sepc.CompiledModel:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(512, 3)).eval()
    return sepc.compile(model, target="cuda:sm_80", example_inputs=(IMAGE,))


@needs_nvcc
def test_sources_and_machine_code_for_every_architecture_compile_without_a_warning(
    compiled: sepc.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "CUDA_ARCHITECTURES", ("sm_75", "sm_80"))
    files = {path.name for path in compiled.export(tmp_path, name="net")}
    assert files >= {"net.h", "net.c", "main.c", "data.S", "kernels.cu", "weights.bin", "README.md"}
    assert {name for name in files if name.endswith(".cubin")} == {"kernels_sm_75.cubin", "kernels_sm_80.cubin"}
    nvcc = Path(shutil.which("nvcc") or "").resolve()
    places = (nvcc.parents[1] / "include", *Path("/usr/local").glob("cuda*/include"))
    headers = next(path for path in places if (path / "cuda.h").exists())
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I.", "-isystem", str(headers)]
    command = ["gcc", *flags, "-c", "net.c", "main.c", "data.S"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    symbols = subprocess.run(["nm", "net.o", "data.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "T net_run" in symbols
    assert "R net_sm_80" in symbols
    defined = (tmp_path / "net.c").read_text()
    assert all(symbol in defined for region in compiled.regions for symbol in region.symbols)


@needs_nvcc
def test_there_is_no_export_of_a_gpus_model_for_tvm(compiled: sepc.CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="format 'tvm'"):
        compiled.export(tmp_path, "tvm")


def test_there_is_no_export_for_opencl(tmp_path: Path) -> None:
    model = sepc.compile(nn.Conv2d(4, 8, 1).eval(), target="opencl", example_inputs=(IMAGE,))
    with pytest.raises(TargetError, match="no export for 'opencl'"):
        model.export(tmp_path)
