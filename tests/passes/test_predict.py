"""Predictions for convolutions in a row are those that the pipeline makes for a model of just these."""

from __future__ import annotations

import torch
from torch import nn

from sepc.cost_model.gpu_machine import GpuMachine
from sepc.frontend.export import capture
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE
from sepc.passes.predict import predicted_us, sequence_us
from sepc.separable.forms import FORMS
from sepc.separable.geometry import Geometry
from sepc.target import Target

MACHINE = Target.parse("x86-64-v3").machine


def test_a_prediction_is_that_for_a_model_of_these_layers() -> None:
    layer = nn.Conv2d(32, 64, 3, padding=1)
    factors = FORMS["bottleneck"].factors(Geometry.of(layer), 48)
    weights = [torch.randn(one.weight_shape) for one in factors]
    model = nn.Sequential(FORMS["bottleneck"].build(Geometry.of(layer), 48, weights, layer.bias), nn.ReLU()).eval()
    x = torch.randn(1, 32, 28, 28).to(memory_format=torch.channels_last)
    for threads in (1, 2):
        graph_module = capture(model, (x,)).graph_module
        PassManager(PIPELINE).run(graph_module, PassContext(machine=MACHINE, threads=threads))
        expected = predicted_us(graph_module, MACHINE, threads)
        assert sequence_us(factors, (1, 32, 28, 28), MACHINE, threads) == expected > 0


def test_more_pixels_and_other_dimensions_are_predicted() -> None:
    one, three = (Geometry.of(layer) for layer in (nn.Conv1d(16, 16, 3), nn.Conv3d(16, 16, 3, padding=1)))
    assert sequence_us((one,), (1, 16, 50), MACHINE, 1) < sequence_us((one,), (1, 16, 5000), MACHINE, 1)
    assert sequence_us((three,), (1, 16, 8, 8, 8), MACHINE, 1) > 0


def test_for_a_gpu_its_planner_is_asked() -> None:
    machine = GpuMachine.load("sm_75")
    factors = FORMS["bottleneck"].factors(Geometry.of(nn.Conv2d(32, 64, 3, padding=1)), 48)
    small, large = (sequence_us(factors, (1, 32, size, size), machine, 1) for size in (14, 112))
    assert machine.launch_us < small < large
