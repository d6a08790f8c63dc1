"""Programs by OpenCL: with PyTorch between kernels, and one clear error where there is no device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import sepc
from sepc.errors import ArtifactError, DeviceError
from sepc.runtime import opencl
from tests.gpus import needs_opencl
from tests.helpers import Function


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The device is looked for anew, also afterwards."""
    opencl.device.cache_clear()
    yield
    opencl.device.cache_clear()


@needs_opencl
def test_pytorch_runs_what_has_no_kernel_between_kernels() -> None:
    model = Function(
        lambda self, x: self.second(torch.sort(self.first(x), dim=1).values),
        first=nn.Conv2d(4, 8, 1),
        second=nn.Conv2d(8, 4, 1),
    ).eval()
    x = torch.randn(1, 4, 6, 6)
    compiled = sepc.compile(model, target="opencl")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert "torch" in {region.kernel for region in compiled.regions}


@needs_opencl
def test_a_call_neither_writes_to_its_input_nor_changes_earlier_results() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU()).eval()
    compiled = sepc.compile(model, target="opencl")
    x = torch.randn(1, 4, 6, 6)
    kept = x.clone()
    first = compiled(x)
    copy = first.clone()
    compiled(2 * x)
    assert torch.equal(x, kept)
    assert torch.equal(first, copy)


@needs_opencl
def test_regions_are_timed() -> None:
    compiled = sepc.compile(nn.Conv2d(4, 8, 1).eval(), target="opencl")
    profile = compiled.profile(torch.randn(1, 4, 6, 6), repeats=2)
    assert all(row.measured_us > 0 for row in profile)


@pytest.mark.usefixtures("forgotten")
def test_no_device_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    cl = pytest.importorskip("pyopencl")
    monkeypatch.setattr(cl, "get_platforms", list)
    compiled = sepc.compile(nn.Conv2d(4, 8, 1).eval(), target="opencl")
    with pytest.raises(DeviceError, match="no OpenCL device") as raised:
        compiled(torch.randn(1, 4, 6, 6))
    assert "pocl-opencl-icd" in str(raised.value)


def test_it_cannot_be_saved(tmp_path: object) -> None:
    compiled = sepc.compile(nn.Conv2d(4, 8, 1).eval(), target="opencl", example_inputs=(torch.randn(1, 4, 6, 6),))
    with pytest.raises(ArtifactError, match="OpenCL cannot be saved"):
        compiled.save(f"{tmp_path}/model.sepc")
