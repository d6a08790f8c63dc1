"""The generic lowering against PyTorch: every operator of its allowlist at one and two threads, and rejections."""

from __future__ import annotations

import ctypes
import operator
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch import fx

from sepc.backends import generic
from sepc.backends.generic_ops import CONVERTERS
from tests.backends.generic_cases import CASES, Case, Tensor, X, integer, real

aten = torch.ops.aten
TARGET = {"kind": "llvm", "mcpu": "x86-64-v3"}
LANES = 8
# No 64-byte alignment: the arrays of the tests start this many bytes after a 64-byte boundary.
MISALIGNMENT = 8


# ---- running a region ----------------------------------------------------------------------------------------------


def overload(name: str) -> Any:
    operator, _, kind = name.partition(".")
    return getattr(getattr(aten, operator), kind)


def graph_of(case: Case, seed: int) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A region that applies one operator to placeholders and returns all tensors of its result."""
    name, args, kwargs = case
    generator = torch.Generator().manual_seed(seed)
    graph, inputs, made = fx.Graph(), [], {}

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(inputs)}")
        inputs.append(value.make(generator))
        node.meta["val"] = inputs[-1].to("meta")
        made[node] = inputs[-1]
        return node

    node = graph.call_function(overload(name), tuple(place(arg) for arg in args), kwargs)
    result = node.target(*fx.map_arg(node.args, lambda n: made[n]), **kwargs)
    if isinstance(result, list | tuple):
        graph.output(tuple(graph.call_function(operator.getitem, (node, position)) for position in range(len(result))))
    else:
        graph.output(node)
    return fx.GraphModule({}, graph), inputs


def build(regions: list[generic.GenericRegion], directory: Path) -> ctypes.CDLL:
    """All kernels of `regions` as one shared library without a TVM runtime."""
    target = tvm.target.Target(TARGET)

    def compile_one(kernel: generic.GenericKernel) -> str:
        path = str(directory / f"{kernel.name}.o")
        tvm.compile(kernel.function, target=target, tir_pipeline="tirx").mod.write_to_file(path, "o")
        return path

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [kernel for region in regions for kernel in region.kernels]))
    library = directory / "kernels.so"
    subprocess.run(["cc", "-shared", "-o", str(library), *objects, "-lm"], check=True)
    return ctypes.CDLL(str(library))


def array(spec: generic.BufferSpec, content: np.ndarray | None = None) -> np.ndarray:
    """A dense array that is aligned to its elements only."""
    memory = np.zeros(spec.size_bytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + MISALIGNMENT
    result = memory[start : start + spec.size_bytes].view(spec.dtype).reshape(spec.shape)
    if content is not None:
        result[...] = content
    return result


def run(
    library: ctypes.CDLL, region: generic.GenericRegion, inputs: list[torch.Tensor], threads: int
) -> list[torch.Tensor]:
    """Call the kernels of `region` as `threads` threads would, one after the other."""
    memory = {key: array(spec, region.constants.get(key)) for key, spec in region.buffers.items()}
    for key, value in zip(region.inputs, inputs, strict=True):
        memory[key][...] = value.numpy()
    for kernel in region.kernels:
        pointers = [ctypes.c_void_p(memory[key].ctypes.data) for key in kernel.inputs + kernel.outputs]
        for thread in range(threads):
            assert getattr(library, kernel.name)(*pointers, thread, threads) == 0
    return [torch.from_numpy(memory[key].copy()) for key in region.outputs]


@dataclass(frozen=True)
class Built:
    """The library of all cases, and for each its region, inputs and expected results."""

    library: ctypes.CDLL
    path: Path
    regions: list[generic.GenericRegion | generic.Rejection]
    inputs: list[list[torch.Tensor]]
    expected: list[list[torch.Tensor]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    directory = tmp_path_factory.mktemp("generic")
    graphs = [graph_of(case, seed) for seed, case in enumerate(CASES)]
    regions = [generic.lower(graph, f"case{i}", LANES) for i, (graph, _) in enumerate(graphs)]
    library = build([region for region in regions if isinstance(region, generic.GenericRegion)], directory)
    expected = [graph(*inputs) for graph, inputs in graphs]
    lists = [list(values) if isinstance(values, tuple) else [values] for values in expected]
    return Built(library, directory, regions, [inputs for _, inputs in graphs], lists)


# ---- tests ---------------------------------------------------------------------------------------------------------


def check(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        torch.testing.assert_close(got, want.contiguous(), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("position", range(len(CASES)), ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_matches_pytorch(built: Built, position: int, threads: int) -> None:
    region = built.regions[position]
    assert isinstance(region, generic.GenericRegion), region
    check(run(built.library, region, built.inputs[position], threads), built.expected[position])


def test_every_allowed_operator_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(CONVERTERS)


def test_objects_need_no_tvm_runtime(built: Built) -> None:
    symbols = subprocess.run(
        ["nm", "-u", *map(str, built.path.glob("*.o"))], check=True, capture_output=True, text=True
    ).stdout
    undefined = {line.split()[-1] for line in symbols.splitlines() if " U " in line or " w " in line}
    assert not [symbol for symbol in undefined if "TVM" in symbol], undefined
    assert undefined <= {"expm1f", "logf", "log1pf", "log2f", "sinf", "cosf", "atanf", "powf", "memset", "memcpy"}


def test_more_threads_than_iterations(built: Built) -> None:
    position = next(i for i, case in enumerate(CASES) if case[0] == "mean.default")
    region = built.regions[position]
    assert isinstance(region, generic.GenericRegion)
    check(run(built.library, region, built.inputs[position], 7), built.expected[position])


def traced(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> fx.GraphModule:
    program = torch.export.export(_Module(function), inputs, strict=False).run_decompositions({})
    return program.graph_module


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def composite(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Chains, a value used three times, constants, reductions inside: what the inliner has to get right."""
    z = torch.nn.functional.gelu(x) + y
    z = z * torch.sigmoid(z) + z.mean((2, 3), keepdim=True)
    halves = torch.nn.functional.interpolate(z, scale_factor=2.0, mode="bilinear").chunk(2, 1)
    return torch.cat([torch.softmax(halves[0], 1), torch.nn.functional.pad(halves[1], (1, 0))[..., :-1]], 1).flatten(2)


def test_composite_region(tmp_path: Path) -> None:
    inputs = [torch.randn(3, 6, 5, 8, generator=torch.Generator().manual_seed(3)), torch.randn(6, 1, 1)]
    region = generic.lower(traced(composite, *inputs), "composite", LANES)
    assert isinstance(region, generic.GenericRegion), region
    assert len(region.temporaries) == len(
        {key for kernel in region.kernels for key in kernel.outputs} - set(region.outputs)
    )
    library = build([region], tmp_path)
    for threads in (1, 2, 5):
        check(run(library, region, inputs, threads), [composite(*inputs)])


def test_attributes_become_constants(tmp_path: Path) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 10, device="meta")
    scaled = graph.call_function(aten.mul.Tensor, (x, graph.get_attr("scale")))
    graph.output((graph.call_function(aten.add.Tensor, (scaled, graph.get_attr("shift"))),))
    module = torch.nn.Module()
    module.scale, module.shift = torch.rand(10), torch.tensor(2.0)
    region = generic.lower(fx.GraphModule(module, graph), "attributes", LANES)
    assert isinstance(region, generic.GenericRegion)
    assert list(region.constants) == ["const0"]
    assert len(region.kernels) == 1
    value = torch.rand(4, 10)
    check(run(build([region], tmp_path), region, [value], 2), [value * module.scale + 2.0])


def edge_values() -> torch.Tensor:
    """Any bits as float32, and what is special among those and among halves: ties, subnormal numbers, infinity."""
    special = torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65504.0, 65520.0, 3.4e38, 1e-7, 1e-40])
    anything = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return torch.cat(
        [special, special.neg(), torch.tensor([torch.inf, -torch.inf, torch.nan]), anything.view(torch.float32)]
    )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_of_halves_are_those_of_pytorch_for_every_value(half: torch.dtype, tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    for source, dtype in ((every, torch.float32), (edge_values(), half)):
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = source.to("meta")
        graph.output(graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype}))
        region = generic.lower(fx.GraphModule({}, graph), f"to_{str(dtype).partition('.')[2]}", LANES)
        assert isinstance(region, generic.GenericRegion), region
        (tmp_path / str(dtype)).mkdir()
        library = build([region], tmp_path / str(dtype))
        result = torch.empty(source.shape, dtype=dtype)
        (kernel,) = region.kernels
        for thread in range(2):
            pointers = ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(result.data_ptr())
            assert getattr(library, kernel.name)(*pointers, thread, 2) == 0
        torch.testing.assert_close(result, source.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_result_that_is_an_input_is_copied(tmp_path: Path) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 5, device="meta")
    graph.output(x)
    region = generic.lower(fx.GraphModule({}, graph), "identity", LANES)
    assert isinstance(region, generic.GenericRegion)
    value = torch.rand(3, 5)
    check(run(build([region], tmp_path), region, [value], 1), [value])


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (("mm.default", (real(4, 5), real(5, 6)), {}), "not on the list"),
        (("conv2d.default", (real(1, 3, 8, 8), real(4, 3, 3, 3)), {}), "not on the list"),
        (("abs.default", (Tensor((4,), torch.int16),), {}), "dtype torch.int16"),
        (("abs.default", (Tensor((4,), torch.float16),), {}), "torch.float16 is only converted"),
        (("argmax.default", (Tensor((4,), torch.bfloat16),), {}), "torch.bfloat16 is only converted"),
        (("abs.default", (real(0, 4),), {}), "0 elements"),
        (("argmax.default", (X,), {}), "over all dimensions"),
        (("cumsum.default", (real(2, 2000), 1), {}), "cumsum over more"),
        (("roll.default", (X, [1]), {}), "flattened"),
        (("linalg_vector_norm.default", (X, 3, [1]), {}), "order 3"),
        (("index.Tensor", (X, [integer(4, low=0, high=2), None, integer(4, low=0, high=6)]), {}), "neighbours"),
        (("pow.Tensor_Scalar", (integer(4), 5), {}), "integer power"),
    ],
)
def test_rejections(case: Case, reason: str) -> None:
    rejection = generic.lower(graph_of(case, 0)[0], "rejected", LANES)
    assert isinstance(rejection, generic.Rejection)
    assert reason in rejection.reason


def test_allowed_nodes() -> None:
    nodes = list(graph_of(("max.dim", (X, 1), {}), 0)[0].graph.nodes)
    assert [generic.is_allowed(node) for node in nodes] == [False, True, True, True, False]
