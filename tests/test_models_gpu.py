"""Whole models for GPUs: through OpenCL at a reduced size anywhere, and on an NVIDIA GPU where there is one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch

import sepc
from benchmarks.models import TESTED, load
from sepc.ir.element import ElementName
from tests.gpus import TOLERANCES, needs_cuda, needs_opencl

REDUCED = {"mobilenetv2_100": 96, "efficientnet_lite0": 96, "convnext_tiny": 64, "xception41": 96}
IN_FLOAT16 = ("mobilenetv2_100", "convnext_tiny")


@needs_opencl
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in REDUCED), *((name, "float16") for name in IN_FLOAT16)]
)
def test_agrees_with_eager_by_opencl(name: str, dtype: ElementName) -> None:
    model, (x,) = load(name, REDUCED[name])
    with torch.inference_mode():
        reference = model(x)
    compiled = sepc.compile(model, target="opencl", dtype=dtype)
    assert (compiled(x) - reference).abs().max() <= TOLERANCES[dtype] * reference.abs().max()
    assert {region.kernel for region in compiled.regions} <= {"sepc", "tvm"}


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in TESTED), *((name, "float16") for name in IN_FLOAT16)]
)
def test_agrees_with_eager_on_an_nvidia_gpu(name: str, dtype: ElementName) -> None:
    model, inputs = load(name)
    with torch.inference_mode():
        references = torch.utils._pytree.tree_leaves(model(*inputs))
    compiled = sepc.compile(model, target="cuda", dtype=dtype)
    results = torch.utils._pytree.tree_leaves(compiled(*(x.cuda() for x in inputs)))
    for result, reference in zip(results, references, strict=True):
        assert (result.cpu() - reference).abs().max() <= TOLERANCES[dtype] * reference.abs().max()


@needs_cuda
@pytest.mark.gpu
def test_is_quicker_than_eager_on_an_nvidia_gpu(record_property: Callable[[str, float], None]) -> None:
    model, (x,) = load("mobilenetv2_100")
    x, compiled = x.cuda(), sepc.compile(model, target="cuda")
    with torch.inference_mode():
        compiled(x)  # While the model is still on the CPU.
        model.cuda()
        nearby = x.to(memory_format=torch.channels_last)
        runners: dict[str, Callable[[], object]] = {
            "sepc": lambda: compiled(x),
            "eager": lambda: model(x),
            "inductor": partial(torch.compile(model), x),
        }
        times_us = {name: median_us(run) for name, run in runners.items()}
        model.to(memory_format=torch.channels_last)
        times_us["cudnn, channels last"] = median_us(lambda: model(nearby))
    for name, time_us in times_us.items():
        record_property(f"{name}, µs", time_us)
    assert times_us["sepc"] < times_us["eager"], times_us


def median_us(run: Callable[[], object]) -> float:
    """The median time of a call on the GPU, in microseconds, after some to warm up."""
    times_us = []
    for _ in range(60):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times_us.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times_us[10:])
