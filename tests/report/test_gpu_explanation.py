"""What becomes of a model on a GPU is explained on a host without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sepc
from sepc.errors import TargetError
from tests.gpus import needs_nvcc


@needs_nvcc
def test_a_model_for_a_gpu_is_explained_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.target.host_gpu", lambda: None)
    layers = nn.Conv2d(16, 96, 1), nn.ReLU6(), nn.Conv2d(96, 96, 3, 2, 1, groups=96), nn.ReLU6(), nn.Conv2d(96, 24, 1)
    x = torch.rand(1, 16, 56, 56).to(memory_format=torch.channels_last)
    explanation = sepc.explain(nn.Sequential(*layers).eval(), x, target="cuda:sm_75")
    (region,) = explanation.regions
    assert region.tiling.startswith("block ")
    assert set(region.bytes_per_level) == {"L2", "DRAM"}
    assert region.predicted_us > region.compute_us > 0
    text = str(explanation)
    assert "compiled for cuda:sm_75" in text
    assert "one kernel, region_0_chain" in text


def test_an_unknown_architecture_is_refused_before_anything_is_compiled() -> None:
    with pytest.raises(TargetError, match=r"no target 'cuda:sm_81'(.|\n)*sm_75, sm_80(.|\n)*did you mean 'cuda:sm_8"):
        sepc.compile(nn.ReLU(), target="cuda:sm_81")
