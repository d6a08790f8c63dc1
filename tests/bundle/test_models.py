"""Whole models for 64-bit Arm: all compile, and some run under emulation from their bundles and agree with eager."""

from __future__ import annotations

import pytest
import torch

import sepc
from benchmarks.models import TESTED, load
from examples.classify import PHOTOGRAPHS, load_model, prepare
from tests.bundle.test_emulation import needs_tools
from tests.helpers import TOLERANCE

SMALL = ("mobilenetv2_100", "fasternet_t0")


@needs_tools
@pytest.mark.slow
def test_real_weights_and_photographs_give_the_classes_of_eager() -> None:
    model = load_model()
    compiled = sepc.compile(model, target="arm64", num_threads=1)
    for read in PHOTOGRAPHS.values():
        image = prepare(read())
        found = compiled(image)
        with torch.inference_mode():
            expected = model(image)
        assert found.argmax() == expected.argmax()
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "threads"), [("mobilenetv2_100", 224, 1), ("convnext_tiny", 96, 2), ("fasternet_t0", 224, 1)]
)
def test_a_model_agrees_with_eager_under_emulation(name: str, size: int, threads: int) -> None:
    model, inputs = load(name, size)
    found = sepc.compile(model, target="arm64:cortex-a76", num_threads=threads)(*inputs)
    with torch.inference_mode():
        expected = model(*inputs)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in TESTED]
)
def test_every_model_compiles_for_arm_without_pytorch(name: str) -> None:
    model, inputs = load(name)
    compiled = sepc.compile(model, target="arm64", num_threads=1, fullgraph=True, example_inputs=inputs)
    assert {one.kernel for one in compiled.regions} <= {"sepc", "tvm"}
    region = max((one for one in compiled.regions if one.kernel == "sepc"), key=lambda one: one.flops)
    assert "fmla" in compiled.source(region, "asm")
