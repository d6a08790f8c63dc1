"""Regions as kernels of a GPU: what does not fit is refused while compiling, and everything else has a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional

import sepc
from sepc.cost_model import gpu_planner
from sepc.cost_model.gpu_search import choose_gpu
from sepc.cost_model.gpu_tiling import GpuLink, GpuTiling, shared_bytes
from sepc.cost_model.search import Choice
from sepc.errors import SepcError, TargetError
from sepc.ir.convolution import Convolution
from sepc.ir.element import ElementName
from tests.gpus import agrees, needs_nvcc, needs_opencl
from tests.helpers import Function

POINTWISE = nn.Conv2d(256, 16, 1).eval()
IMAGE = torch.randn(1, 256, 16, 16)


def given(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Every convolution gets a tiling for all 256 input channels in one turn, but for these changes."""

    def choose(links: tuple[Convolution, ...], *rest: object) -> Choice | None:
        tiling = replace(GpuTiling(1, 64, 16, 64, (GpuLink(4, 1),), 256, 0, 64), **changes)
        shape = (tiling.rows, tiling.columns, tiling.channels, tiling.chunk)
        found = choose_gpu(links, *rest)
        return None if found is None else Choice(replace(tiling, shared_bytes=shared_bytes(links, *shape)), found.cost)

    monkeypatch.setattr(gpu_planner, "choose_gpu", choose)


def test_a_tile_that_exceeds_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, columns=256, threads=256)
    with pytest.raises(TargetError, match="does not fit sm_75") as raised:
        sepc.compile(POINTWISE, target="cuda:sm_75", example_inputs=(IMAGE,))
    assert "266240 bytes of shared memory, and 65536 is the most" in str(raised.value)


def test_more_threads_than_a_block_may_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, columns=16, threads=2048)
    with pytest.raises(TargetError, match="2048 threads, and 256 is the most"):
        sepc.compile(POINTWISE, target="opencl", example_inputs=(IMAGE,))


@needs_nvcc
def test_shared_memory_beyond_what_a_kernel_may_declare_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    compiled = sepc.compile(POINTWISE, target="cuda:sm_80", example_inputs=(IMAGE,))
    (convolution,) = (region for region in compiled.regions if region.kind == "convolution")
    assert "extern __shared__" in compiled.source(convolution, "cuda")
    assert convolution.resources[0].shared_bytes == 64 * 260 * 4


@needs_opencl
@pytest.mark.parametrize("dtype", get_args(ElementName))
@pytest.mark.parametrize(
    ("name", "model", "shape"),
    [
        ("grouped", nn.Conv2d(16, 24, 3, 1, 1, groups=4), (2, 16, 7, 6)),
        ("multiplier", nn.Conv2d(8, 16, 3, 1, 1, groups=8), (1, 8, 7, 6)),
        ("transposed", nn.ConvTranspose2d(8, 12, 4, 2, 1), (1, 8, 5, 6)),
        ("three dimensions", nn.Conv3d(4, 6, 3, 1, 1), (1, 4, 4, 5, 6)),
        ("pooling", nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2)), (1, 10, 9, 9)),
        ("layer normalisation", nn.LayerNorm(30), (7, 30)),
        ("group normalisation", nn.GroupNorm(4, 16), (2, 16, 7, 6)),
        ("softmax", nn.Softmax(-1), (7, 50)),
        ("elementwise", nn.Sequential(nn.GELU(), nn.Hardswish(), nn.Sigmoid()), (7, 50, 3)),
    ],
)
def test_what_has_no_tiling_for_blocks_has_a_task_per_thread(
    name: str, model: nn.Module, shape: tuple[int, ...], dtype: ElementName
) -> None:
    agrees(model, torch.randn(shape), dtype=dtype)


@needs_opencl
def test_attention_and_concatenation() -> None:
    def forward(_: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(x @ y.transpose(-1, -2), -1)
        return torch.cat([weights @ y, x], -1)

    agrees(Function(forward), torch.randn(2, 9, 8), torch.randn(2, 11, 8))


@needs_opencl
def test_parts_of_a_concatenation_begin_where_no_vector_does() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 16, 1)
            self.last = nn.Conv2d(22, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.cat([self.first(x), self.second(x)], 1))

    agrees(Model(), torch.randn(1, 8, 5, 5))


@needs_opencl
def test_operators_that_tvm_lowers_run_there_too() -> None:
    agrees(Function(lambda _, x: functional.interpolate(x, scale_factor=2)), torch.randn(1, 4, 5, 6), kernels="tvm")


@needs_opencl
def test_not_a_number_stays_one() -> None:
    x = torch.tensor([[float("nan"), -1.0, 2.0, float("inf")]])
    compiled = sepc.compile(nn.Sequential(nn.ReLU6(), nn.Hardtanh()).eval(), target="opencl")
    torch.testing.assert_close(compiled(x), torch.tensor([[float("nan"), 0.0, 1.0, 1.0]]), equal_nan=True)


def test_sources_are_those_that_there_are_for_the_target() -> None:
    compiled = sepc.compile(POINTWISE, target="opencl", example_inputs=(IMAGE,))
    region = next(one for one in compiled.regions if one.kind == "convolution")
    assert "__global__" in compiled.source(region, "cuda")
    assert "__kernel" in compiled.source(region, "opencl")
    assert "thread_extent" in compiled.source(region, "tirx") or "launch_thread" in compiled.source(region, "tirx")
    with pytest.raises(SepcError, match="no source form 'asm'"):
        compiled.source(region, "asm")
