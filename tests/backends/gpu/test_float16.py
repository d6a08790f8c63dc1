"""Kernels of GPUs in float16: halves in memory, sums in float32, and the caller's own types around."""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch
from torch import nn
from torch.nn import functional

import sepc
from sepc.cost_model.gpu_latency import GpuProblem
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_search import gpu_tilings
from sepc.ir.convolution import Convolution
from sepc.ir.element import FLOAT16
from tests.bundle.test_emulation import block
from tests.gpus import agrees, needs_nvcc, needs_opencl
from tests.helpers import Function

LONG: Final = 4096


def network() -> nn.Module:
    """A stem, an inverted residual, a head."""
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish(), block(16, 64), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10), nn.Softmax(-1)).eval()


@needs_opencl
def test_a_network_agrees_with_eager_and_keeps_halves() -> None:
    compiled = agrees(network(), torch.randn(2, 3, 33, 31), dtype="float16")
    assert "chain" in {one.kind for one in compiled.regions}
    chain = next(one for one in compiled.regions if one.kind == "chain")
    code = compiled.source(chain, "cuda")
    assert "__shared__ alignas(64) half" in code
    assert "float* __restrict__" not in code
    assert "operators compute in float16" in str(compiled.explain())


@needs_opencl
def test_attention_and_concatenation() -> None:
    def forward(_: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(x @ y.transpose(-1, -2), -1)
        return torch.cat([weights @ y, x * 2], -1)

    agrees(Function(forward), torch.randn(2, 9, 8), torch.randn(2, 11, 8), dtype="float16")


@needs_opencl
def test_what_tvm_lowers_is_between_conversions() -> None:
    layers = nn.Conv2d(8, 20, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(20, 8, 1)
    agrees(nn.Sequential(*layers), torch.randn(1, 8, 6, 6), kernels="sepc tvm", dtype="float16")


@needs_opencl
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_a_half_type_takes_and_gives_it(half: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()).to(half)
    kernels = "sepc" if half == torch.float16 else "sepc tvm"
    agrees(model, torch.randn(1, 16, 9, 9).to(half), kernels=kernels, dtype="float16")


@needs_opencl
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param(nn.Linear(LONG, 9), (3, LONG), id="product"),
        pytest.param(nn.Conv2d(LONG // 4, 9, 3), (1, LONG // 4, 4, 4), id="dense"),
        pytest.param(nn.Conv2d(12, 12, (51, 50), groups=12), (1, 12, 51, 53), id="depthwise"),
        pytest.param(nn.Conv2d(16, 32, (51, 13), groups=8), (1, 16, 51, 14), id="grouped"),
        pytest.param(nn.AdaptiveAvgPool2d(1), (1, 9, 60, 60), id="mean"),
    ],
)
def test_sums_do_not_stall(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Of ones, a sum in float16 gets no further than 2048."""
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(shape)
    compiled = sepc.compile(layer.eval(), target="opencl", dtype="float16")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=2**-10, atol=0)


@needs_opencl
def test_conversions_that_the_model_makes_round_as_eager() -> None:
    def forward(_: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.half().float() * 3, x.half(), x.half() == 1

    numbers = [1 + 2.0**-12, 1 + 3 * 2.0**-11, 65519.0, 65520.0, -1e9, 2.0**-24, 2.0**-26, 0.0, torch.inf, torch.nan]
    x = torch.tensor(numbers).repeat(5)
    results = sepc.compile(Function(forward).eval(), target="opencl")(x)
    for result, expected in zip(results, forward(nn.Module(), x), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_weights_take_half_the_memory_and_blocks_move_half_the_bytes() -> None:
    x = torch.randn(1, 3, 33, 31)
    compiled = [
        sepc.compile(network(), target="opencl", dtype=dtype, example_inputs=(x,)) for dtype in ("float32", "float16")
    ]
    wide, narrow = (one._last().executable.program.constants_bytes for one in compiled)
    assert narrow <= 0.55 * wide
    size = (1, 28, 28, 28, 28)
    links = (Convolution(*size, 64, 128), Convolution(*size, 128, 128, 128, (3, 3), (1, 1), (1, 1)))
    machine, none = GpuMachine.load("sm_80"), (0, 0)
    problem = GpuProblem(links, machine, none, none)
    half = GpuProblem(tuple(link.of(FLOAT16) for link in links), machine, none, none)
    for tiling in list(gpu_tilings(half))[::50]:
        assert half.global_bytes(tiling) == problem.global_bytes(tiling) / 2
        assert half.predict(tiling).bytes_moved == problem.predict(tiling).bytes_moved / 2


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_no_register_spills(architecture: str) -> None:
    x = torch.randn(1, 3, 64, 64)
    compiled = sepc.compile(network(), target=f"cuda:{architecture}", dtype="float16", example_inputs=(x,))
    found: list[Any] = [one for region in compiled.regions for one in region.resources]
    assert found
    assert all(one.spilled_bytes == 0 for one in found)
    assert "in float16" in str(compiled.explain()).splitlines()[0]


@needs_opencl
def test_elementwise_operators_agree_with_eager() -> None:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ratio = torch.tanh(x) * y / (1 + y.abs()) + x.exp() - y.sqrt().mul(1e-6)
        return ratio, functional.leaky_relu(x), x.maximum(y).clamp(-1, 1e5), torch.erf(x), x.movedim(1, -1).relu()

    agrees(Function(forward), torch.randn(1, 13, 6, 7), torch.rand(7) + 0.1, dtype="float16")
