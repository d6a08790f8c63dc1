"""Kernels through nvcc: no spills on any listed architecture, and one clear error where it is missing or refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc.backends.gpu import nvcc
from sepc.backends.gpu.build import resources_of
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.errors import BuildError, TargetError
from sepc.runtime.gpu import Launch
from tests.gpus import needs_nvcc

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 8 bytes cumulative stack size, 1280 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 400 bytes cmem[0]
"""


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)


def test_the_assemblers_words_are_understood() -> None:
    assert nvcc.parse_usage(LOG) == {"first": nvcc.Usage(96, 16, 1280), "second": nvcc.Usage(32, 0, 0)}


def test_occupancy_counts_registers_shared_memory_and_threads() -> None:
    machine = GpuMachine.load("sm_80")  # 64 warps, 65536 registers, and at most 163 KiB of shared memory per block.
    by_registers = resources_of(nvcc.Usage(128, 0, 0), Launch(10, 256, 0, ()), machine)
    assert by_registers.occupancy == pytest.approx(2 * 8 / 64)
    by_shared = resources_of(nvcc.Usage(32, 0, 80 << 10), Launch(10, 128, 0, ()), machine)
    assert by_shared.occupancy == pytest.approx(2 * 4 / 64)
    asked_for = resources_of(nvcc.Usage(32, 0, 0), Launch(10, 128, 80 << 10, ()), machine)
    assert asked_for.shared_bytes == by_shared.shared_bytes
    assert asked_for.occupancy == by_shared.occupancy


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_no_register_of_a_separable_network_spills(architecture: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6(), nn.Conv2d(16, 24, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    compiled = sepc.compile(model.eval(), target=f"cuda:{architecture}", example_inputs=(torch.randn(1, 3, 32, 32),))
    resources = [one for region in compiled.regions for one in region.resources]
    assert len(resources) == len({symbol for region in compiled.regions for symbol in region.symbols})
    assert all(one.spilled_bytes == 0 and 0 < one.registers <= 255 and 0 < one.occupancy <= 1 for one in resources)
    assert "occupancy" in str(compiled.explain())


@needs_nvcc
def test_machine_code_is_kept_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPC_CACHE", "1")
    source = 'extern "C" __global__ void one(float* x) { x[threadIdx.x] = 1.0f; }'
    first = nvcc.compile_source(source, "sm_80")
    assert first.usage["one"].spilled_bytes == 0
    monkeypatch.setattr(nvcc.subprocess, "run", lambda *command, **options: pytest.fail("compiled again"))
    assert nvcc.compile_source(source, "sm_80") == first


@pytest.mark.usefixtures("no_nvcc")
def test_a_missing_compiler_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(BuildError, match="no CUDA compiler") as raised:
        sepc.compile(nn.Conv2d(3, 8, 1).eval(), target="cuda:sm_80", example_inputs=(torch.randn(1, 3, 8, 8),))
    assert "CUDA toolkit" in str(raised.value)


def test_an_unknown_architecture_is_an_error_that_names_known_ones() -> None:
    with pytest.raises(TargetError, match="cuda:sm_81") as raised:
        sepc.compile(nn.Conv2d(3, 8, 1).eval(), target="cuda:sm_81")
    assert "sm_80" in str(raised.value)


@needs_nvcc
def test_an_architecture_that_this_compiler_does_not_know_is_an_error() -> None:
    with pytest.raises(TargetError, match="does not know the architecture 'sm_20'"):
        nvcc.compile_source("", "sm_20")


@needs_nvcc
def test_a_source_that_the_compiler_refuses_is_an_error_with_its_words() -> None:
    with pytest.raises(BuildError, match="no storage class"):
        nvcc.compile_source("nonsense", "sm_80")
