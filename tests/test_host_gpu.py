"""The GPU of a host, from what its tools say."""

from __future__ import annotations

import pytest
import torch

from sepc import host_gpu
from sepc.cost_model.gpus import HostGpu


def test_nvidia_smi_tells_the_first_gpu() -> None:
    text = "NVIDIA RTX A4000, 8.6\nTesla T4, 7.5\n"
    assert host_gpu.parse_smi(text) == HostGpu("NVIDIA RTX A4000", (8, 6))


@pytest.mark.parametrize("text", ["", "No devices were found\n", "NVIDIA A100, [N/A]\n"])
def test_nothing_that_nvidia_smi_says_is_no_gpu(text: str) -> None:
    assert host_gpu.parse_smi(text) is None


def test_a_host_has_a_gpu_if_pytorch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_gpu.shutil, "which", lambda name: None)
    found = host_gpu.host_gpu.__wrapped__()
    assert (found is not None) == torch.cuda.is_available()


def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host_gpu.shutil, "which", lambda name: "/bin/false")
    monkeypatch.setattr(host_gpu, "NVIDIA_SMI", "/bin/false")
    assert host_gpu.host_gpu.__wrapped__() is None
