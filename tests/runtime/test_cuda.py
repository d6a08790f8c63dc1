"""Programs on an NVIDIA GPU. Without one: what is handed to the driver, and one clear error for what cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sepc
from sepc.errors import ArtifactError, DeviceError, InputError, TargetError
from sepc.runtime import cuda
from sepc.runtime.gpu import Launch
from sepc.runtime.program import KernelCall, Pointer
from tests.gpus import needs_cuda, needs_nvcc

MODEL = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, 1, 1, groups=8)).eval()
IMAGE = torch.randn(1, 4, 8, 8)


@dataclass
class Driver:
    """Stands for the binding, and remembers what was launched."""

    error: str = "CUDA_SUCCESS"
    CUresult: Any = field(default_factory=lambda: SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS")))
    launched: list[tuple[Any, ...]] = field(default_factory=list)

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Any]:  # noqa: N802 -- the driver's name
        self.launched.append(arguments)
        success = self.CUresult.CUDA_SUCCESS
        return (success if self.error == "CUDA_SUCCESS" else SimpleNamespace(name=self.error),)


def test_a_kernel_gets_addresses_its_launch_and_the_stream() -> None:
    driver = Driver()
    loaded = cuda._Loaded(driver, {"kernel": "handle"}, torch.empty(0), [])
    call = KernelCall("kernel", (Pointer(1, 64), Pointer(0, 0)), 0)
    loaded.launch(call, Launch(10, 128, 50000, (4, 4)), [1000, 2000], 77)
    ((function, *grid_and_block, shared_bytes, stream, (addresses, types), extra),) = driver.launched
    assert (function, shared_bytes, stream, extra) == ("handle", 50000, 77, 0)
    assert grid_and_block == [10, 1, 1, 128, 1, 1]
    assert addresses == (2064, 1000)
    assert len(types) == 2


def test_what_the_driver_refuses_is_an_error_with_its_name() -> None:
    driver = Driver(error="CUDA_ERROR_INVALID_VALUE")
    loaded = cuda._Loaded(driver, {"kernel": "handle"}, torch.empty(0), [])
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE"):
        loaded.launch(KernelCall("kernel", (), 0), Launch(1, 32, 0, ()), [], 0)


def test_tensors_that_are_not_on_a_gpu_are_refused() -> None:
    with pytest.raises(InputError, match="not on one GPU") as raised:
        cuda._device_of([torch.empty(1)])
    assert "x.cuda()" in str(raised.value)


def test_only_what_begins_where_no_vector_can_be_loaded_is_copied() -> None:
    whole = torch.arange(64.0)
    part = whole[1:]
    assert cuda._aligned(whole) is whole
    assert torch.equal(cuda._aligned(part), part)
    assert cuda._aligned(part).data_ptr() % cuda.ALIGNMENT_BYTES == 0


@needs_nvcc
def test_without_a_gpu_a_call_is_an_error_that_says_to_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.target.host_gpu", lambda: None)
    compiled = sepc.compile(MODEL, target="cuda:sm_80", example_inputs=(IMAGE,))
    with pytest.raises(TargetError, match="NVIDIA GPU") as raised:
        compiled(IMAGE)
    assert "export" in str(raised.value)
    with pytest.raises(ArtifactError, match="cannot be saved"):
        compiled.save("model.sepc")


@pytest.mark.gpu
@needs_cuda
def test_results_are_on_the_gpu_and_agree_with_eager() -> None:
    compiled = sepc.compile(MODEL, target="cuda")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGE.cuda()).cpu(), MODEL(IMAGE), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_cuda
def test_a_call_runs_on_the_current_stream_and_in_a_cuda_graph() -> None:
    compiled, x = sepc.compile(MODEL, target="cuda"), IMAGE.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = compiled(x).clone()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compiled(x)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        torch.testing.assert_close(result.cpu(), MODEL(2 * IMAGE), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected.cpu(), MODEL(IMAGE), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_cuda
def test_pytorch_runs_what_has_no_kernel_on_the_gpu() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)).eval()
    compiled = sepc.compile(model, target="cuda")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGE.cuda()).cpu(), model(IMAGE), rtol=1e-4, atol=1e-4)
    assert all(row.measured_us > 0 for row in compiled.profile(IMAGE.cuda(), repeats=3))
