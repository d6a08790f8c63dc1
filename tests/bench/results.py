"""What tests of measurements share: a job that is quick, figures without measuring, and tables as text."""

from __future__ import annotations

import io

import torch
from rich.console import Console
from torch import nn

from sepc.bench.measure import ModelResult, PeerResult
from sepc.bench.peers import AVX2, NATIVE, PARTLY_AVX2, UNRESTRICTED, Job, Runner


def job_of() -> Job:
    """A small network with its input."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval().requires_grad_(False)
    return Job(model, (torch.randn(1, 3, 8, 8),), threads=1)


def altered(job: Job, change: float) -> Runner:
    """Eager, but with `change` added to its output."""
    return Runner(lambda: job.model(*job.inputs) + change, lambda result: [torch.as_tensor(result)])


def result(median_ms: float, error: float = 0.0, failure: str = "", isa: str = NATIVE) -> PeerResult:
    return PeerResult([median_ms] if not failure else [], median_ms, error, 1.0, failure, isa=isa)


def row(model: str = "net", threads: int = 1, isa: str = NATIVE, **peers: PeerResult) -> ModelResult:
    return ModelResult(model, "1x3x224x224", threads, peers, isa)


def limited_row() -> ModelResult:
    return row(
        isa=AVX2,
        onnxruntime=result(2.0, isa=UNRESTRICTED),
        openvino=result(4.0, isa=PARTLY_AVX2),
        xnnpack=result(6.0, isa=AVX2),
        sepc=result(3.0, isa=AVX2),
    )


def rendered(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
