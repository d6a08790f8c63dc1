"""The compile-time check of what TVM lowered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sepc
from sepc.backends import generic_ops
from tests.gpus import needs_opencl

TARGETS = ["native", pytest.param("opencl", marks=needs_opencl)]


class Rolled(nn.Module):
    """An operator that TVM lowers, between two of ours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.roll(torch.relu(x), 1, 2) * 2


@pytest.mark.parametrize("target", TARGETS)
def test_a_right_kernel_of_tvm_is_kept(target: str) -> None:
    compiled = sepc.compile(Rolled().eval(), target=target)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(compiled(x), Rolled()(x))
    assert [region.kernel for region in compiled.regions] == ["sepc", "tvm", "sepc"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_kernel_of_tvm_is_handed_to_pytorch_with_the_difference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    right = generic_ops.CONVERTERS["roll.default"]

    def wrong(emitter: Any, x: Any, shifts: Any, dims: Any = ()) -> Any:
        return right(emitter, x, [shift + 1 for shift in shifts], dims)

    monkeypatch.setitem(generic_ops.CONVERTERS, "roll.default", wrong)
    compiled = sepc.compile(Rolled().eval(), target=target)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(compiled(x), Rolled()(x))
    rolled = compiled.regions[1]
    assert rolled.kernel == "torch"
    assert "differs from PyTorch" in rolled.reason
    assert "runs in PyTorch" in caplog.text
