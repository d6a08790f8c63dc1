"""Kernels that cannot be made for a GPU: PyTorch takes their place, with a warning, as on CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import sepc
from sepc.backends.gpu import build, nvcc
from sepc.backends.gpu.languages import Language
from sepc.errors import BuildError, ModelError
from tests.gpus import needs_nvcc, needs_opencl

MODEL = nn.Sequential(nn.Conv2d(4, 8, 3), nn.AvgPool2d(2)).eval()
IMAGE = torch.randn(1, 4, 8, 8)
OPENCL, CUDA = "opencl", "cuda:sm_80"


def symbols(target: str) -> list[str]:
    """The kernels of `MODEL`, in order."""
    compiled = sepc.compile(MODEL, target=target, example_inputs=(IMAGE,))
    return [symbol for region in compiled.regions for symbol in region.symbols]


def beyond_these_languages(monkeypatch: pytest.MonkeyPatch, *refused: str) -> None:
    """No source can be made of these kernels."""
    right = build.source_of

    def source_of(functions: Mapping[str, Any], language: Language) -> str:
        if set(refused) & set(functions):
            raise BuildError("A kernel cannot be written for a GPU", why="it has a call of LLVM's own")
        return right(functions, language)

    monkeypatch.setattr(build, "source_of", source_of)


@needs_opencl
@pytest.mark.parametrize("number", [0, -1])
def test_a_kernel_that_has_no_form_is_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    beyond_these_languages(monkeypatch, symbols(OPENCL)[number])
    compiled = sepc.compile(MODEL, target=OPENCL)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGE), MODEL(IMAGE), rtol=1e-4, atol=1e-4)
    (left,) = (one for one in compiled.regions if one.kernel == "torch")
    assert left.reason == "its kernel could not be compiled: it has a call of LLVM's own"
    assert f"{left.name} runs in PyTorch: {left.reason}" in caplog.text
    assert left.reason in str(compiled.explain())


def test_where_no_kernel_has_a_form_that_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    beyond_these_languages(monkeypatch, *symbols(OPENCL))
    with pytest.raises(BuildError, match=r"kernels could not be compiled[\s\S]*LLVM's own"):
        sepc.compile(MODEL, target=OPENCL, example_inputs=(IMAGE,))


@needs_nvcc
def test_kernels_that_have_no_form_and_those_that_nvcc_refuses_are_told_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *_, last = symbols(CUDA)
    right = nvcc.compile_source

    def compile_source(source: str, architecture: str) -> nvcc.Cubin:
        return right("nonsense" if last in source else source, architecture)

    monkeypatch.setattr(build, "compile_source", compile_source)
    beyond_these_languages(monkeypatch, first)
    told = str(sepc.explain(MODEL, IMAGE, target=CUDA))
    assert "LLVM's own" in told
    assert "its kernel could not be compiled: kernels.cu" in told


@needs_nvcc
def test_a_kernel_that_nvcc_refuses_is_told_and_cannot_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.target.host_gpu", lambda: None)
    refused, right = symbols(CUDA)[-1], nvcc.compile_source

    def compile_source(source: str, architecture: str) -> nvcc.Cubin:
        return right("nonsense" if refused in source else source, architecture)

    monkeypatch.setattr(build, "compile_source", compile_source)
    assert "its kernel could not be compiled: kernels.cu" in str(sepc.explain(MODEL, IMAGE, target=CUDA))
    with pytest.raises(ModelError, match="no storage class"):
        sepc.compile(MODEL, target=CUDA, example_inputs=(IMAGE,))
