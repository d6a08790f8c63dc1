"""What tests of GPUs share: whether there is an OpenCL device, nvcc or a GPU, and tilings drawn from all legal ones."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import sepc
from sepc.cost_model import gpu_planner
from sepc.cost_model.gpu_latency import GpuProblem
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_search import choose_gpu, gpu_tilings
from sepc.cost_model.search import Choice
from sepc.errors import DeviceError
from sepc.ir.convolution import Convolution
from sepc.ir.element import ElementName
from sepc.passes import fuse
from sepc.runtime import opencl

TOLERANCE = 1e-4
TOLERANCES: dict[ElementName, float] = {"float32": TOLERANCE, "float16": 5e-3}
"""Of results, relative to the largest: in float16 ten roundings, of inputs, weights and results."""
MANY = 3000


def _has_opencl() -> bool:
    try:
        opencl.device()
    except DeviceError:
        return False
    return True


needs_opencl = pytest.mark.skipif(not _has_opencl(), reason="there is no OpenCL device (PoCL: pocl-opencl-icd)")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc (the CUDA toolkit)")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")


def agrees(
    model: nn.Module, *inputs: torch.Tensor, kernels: str = "sepc", dtype: ElementName = "float32"
) -> sepc.CompiledModel:
    """Compile `model` for OpenCL and compare with eager; `kernels` are who runs regions."""
    model = model.eval()
    compiled = sepc.compile(model, target="opencl", dtype=dtype)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*inputs))
    for result, reference in zip(pytree.tree_leaves(compiled(*inputs)), expected, strict=True):
        assert (result.shape, result.dtype) == (reference.shape, reference.dtype)
        error = (result.float() - reference.float()).abs().max() / reference.float().abs().max().clamp(min=1e-6)
        assert error <= TOLERANCES[dtype], f"relative error {error:.2g}"
    assert {region.kernel for region in compiled.regions} == set(kernels.split())
    return compiled


@contextmanager
def any_tiling(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[None]:
    """Chains are as long as can be, and tilings are drawn from all that are legal."""
    generator = random.Random(seed)

    def choose_any(links: tuple[Convolution, ...], machine: GpuMachine, *costs: tuple[int, ...]) -> Choice | None:
        best = choose_gpu(links, machine, *costs)
        every = list(islice(gpu_tilings(GpuProblem(links, machine, *costs)), MANY))
        return None if best is None else Choice(generator.choice(every), best.cost)

    def piece_time_us(links: Sequence[object], *rest: object) -> float | None:
        found = original(links, *rest)
        return None if found is None else 1.0

    original = fuse.piece_time_us
    with monkeypatch.context() as patch:
        patch.setattr(gpu_planner, "choose_gpu", choose_any)
        patch.setattr(fuse, "piece_time_us", piece_time_us)
        yield
