"""The public API as a user meets it: structures, shapes, threads, targets, and one clear error for each wrong use."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

import sepc

TOLERANCE = 1e-4


class Small(nn.Module):
    """A small network of each common part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.point(torch.relu(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


def agrees(result: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((result - reference).abs().max() <= TOLERANCE * reference.abs().max())


@pytest.fixture
def small() -> nn.Module:
    return Small().eval()


def test_first_call_compiles_and_agrees_with_eager(small: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    compiled = sepc.compile(small)
    assert agrees(compiled(x), small(x))
    assert compiled(x).requires_grad is False


def test_regions_describe_the_kernels(small: nn.Module) -> None:
    compiled = sepc.compile(small, example_inputs=(torch.randn(1, 3, 32, 32),))
    stem = compiled.regions[0]
    assert (stem.kind, stem.kernel) == ("convolution", "sepc")
    assert stem.ops[0].startswith("conv2d")
    assert stem.tiling
    assert stem.predicted_us > 0
    assert stem.bottleneck in ("compute", "L2", "L3", "DRAM")
    assert stem.flops == 2 * 16 * 27 * 16 * 16
    assert stem.bytes_moved >= 4 * (3 * 32 * 32 + 16 * 27 + 16 * 16 * 16)
    assert {region.kernel for region in compiled.regions} == {"sepc"}


def test_source_is_shown_in_each_form(small: nn.Module) -> None:
    compiled = sepc.compile(small, example_inputs=(torch.randn(1, 3, 32, 32),))
    region = compiled.regions[0]
    assert "prim_func" in compiled.source(region, "tirx")
    assert "define" in compiled.source(region.name, "llvm")
    assert "vfmadd" in compiled.source(region, "asm")
    with pytest.raises(sepc.SepcError, match="no kernel for region 'nonsense'"):
        compiled.source("nonsense")


def test_graph_module_is_still_run_by_pytorch(small: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    compiled = sepc.compile(small, example_inputs=(x,))
    assert agrees(compiled.graph_module(x)[0], small(x))


def test_profile_times_every_region(small: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    compiled = sepc.compile(small)
    profile = compiled.profile(x, repeats=3)
    assert [row.name for row in profile] == [region.name for region in compiled.regions]
    assert all(row.measured_us > 0 for row in profile)
    assert [row.predicted_us for row in profile] == [region.predicted_us for region in compiled.regions]


def test_profile_is_of_the_shape_it_is_asked_for(small: nn.Module) -> None:
    # One thread: two of them may wait for each other on a busy machine, longer than either works.
    compiled = sepc.compile(small, num_threads=1)
    large, tiny = torch.randn(1, 3, 256, 256), torch.randn(1, 3, 8, 8)
    compiled(large)
    compiled(tiny)
    large_us, tiny_us = (compiled.profile(x, repeats=9).measured_us for x in (large, tiny))
    assert large_us > 3 * tiny_us


def test_compile_times_are_split_by_stage(small: nn.Module) -> None:
    compiled = sepc.compile(small, example_inputs=(torch.randn(1, 3, 32, 32),))
    assert list(compiled.compile_times) == ["capture", "imports", "passes", "lower", "kernels", "link"]


class Nested(nn.Module):
    """Nested and keyword inputs, and a nested output with a constant in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, pair: dict[str, Any], scale: float = 1.0, *, bias: torch.Tensor | None = None) -> dict[str, Any]:
        left, right = pair["both"]
        total = self.linear(left) * scale + right
        if bias is not None:
            total = total + bias
        return {"total": total, "parts": (left, [total.relu()]), "name": "nested"}


def test_nested_and_keyword_arguments_and_results_keep_their_structure() -> None:
    model = Nested().eval()
    pair = {"both": (torch.randn(4, 8), torch.randn(4, 8))}
    compiled = sepc.compile(model)
    for keywords in ({}, {"scale": 2.0}, {"scale": 2.0, "bias": torch.randn(8)}):
        result, reference = compiled(pair, **keywords), model(pair, **keywords)
        assert result.keys() == reference.keys()
        assert result["name"] == "nested"
        assert agrees(result["total"], reference["total"])
        assert torch.equal(result["parts"][0], pair["both"][0])
        assert agrees(result["parts"][1][0], reference["parts"][1][0])


def test_an_exported_program_is_compiled(small: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    compiled = sepc.compile(torch.export.export(small, (x,)))
    assert agrees(compiled(x), small(x))
    with pytest.raises(sepc.InputError, match="32, 32"):
        compiled(torch.randn(1, 3, 48, 48))


def test_strides_of_inputs_do_not_matter(small: nn.Module) -> None:
    compiled = sepc.compile(small)
    plain = torch.randn(2, 3, 32, 32)
    for x in (
        plain,
        plain.contiguous(memory_format=torch.channels_last),
        plain.transpose(2, 3),
        torch.randn(2, 3, 64, 64)[:, :, ::2, ::2],
        torch.randn(1, 3, 32, 32).expand(2, 3, 32, 32),
        torch.randn(3, 3, 32, 32)[1:],
    ):
        assert agrees(compiled(x), small(x))


def test_results_have_the_strides_of_eager() -> None:
    model = nn.Conv2d(3, 16, 3).eval()
    x = torch.randn(1, 3, 9, 9)
    compiled = sepc.compile(model)
    assert compiled(x).stride() == model(x).stride()
    last = x.contiguous(memory_format=torch.channels_last)
    assert compiled(last).stride() == model(last).stride()


def test_results_of_two_calls_do_not_share_memory(small: nn.Module) -> None:
    compiled = sepc.compile(small)
    first = compiled(torch.randn(1, 3, 32, 32))
    kept = first.clone()
    compiled(torch.randn(1, 3, 32, 32))
    assert torch.equal(first, kept)


def test_new_shapes_compile_again_up_to_the_limit(small: nn.Module) -> None:
    compiled = sepc.compile(small, shape_limit=2)
    for size in (32, 40, 32):
        x = torch.randn(1, 3, size, size)
        assert agrees(compiled(x), small(x))
    with pytest.raises(sepc.InputError, match=r"2 input shapes, the limit[\s\S]*shape_limit"):
        compiled(torch.randn(1, 3, 48, 48))


def test_one_tensor_given_twice_at_the_first_call_is_two_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * 2 + y

    compiled, x, y = sepc.compile(Sum().eval()), torch.randn(3, 4), torch.randn(3, 4)
    for right in (x, x.view(3, 4), y):
        assert torch.equal(compiled(x, right), x * 2 + right)


def test_numbers_of_another_type_compile_again() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return x * scale

    compiled, x = sepc.compile(Scaled().eval()), torch.arange(4)
    assert [compiled(x, scale).dtype for scale in (1, 1.0)] == [torch.int64, torch.float32]


def test_an_argument_that_is_no_value_is_refused(small: nn.Module) -> None:
    with pytest.raises(sepc.InputError, match="neither a tensor nor a plain value"):
        sepc.compile(small)(torch.randn(1, 3, 32, 32).numpy())


def test_threads_follow_pytorch_unless_given(small: nn.Module) -> None:
    assert sepc.compile(small, num_threads=1).threads == 1
    compiled = sepc.compile(small)
    x = torch.randn(1, 3, 32, 32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert compiled.threads == threads
            assert agrees(compiled(x), small(x))
    finally:
        torch.set_num_threads(before)
    with pytest.raises(sepc.InputError, match="num_threads is 0"):
        sepc.compile(small, num_threads=0)


def test_several_python_threads_may_call_at_once(small: nn.Module) -> None:
    compiled = sepc.compile(small, num_threads=1)
    inputs = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    references = [small(x) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        wrong.extend(index for _ in range(50) if not agrees(compiled(inputs[index]), references[index]))

    workers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_an_operator_without_kernel_runs_in_pytorch_and_says_so() -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, indices = torch.relu(x).sort(-1).values.topk(3)
            return values + 1, indices

    model, x = Sorted().eval(), torch.randn(4, 8, 8)
    compiled = sepc.compile(model)
    values, indices = compiled(x)
    expected = model(x)
    assert agrees(values, expected[0])
    assert torch.equal(indices, expected[1])
    fallback = [region for region in compiled.regions if region.kernel == "torch"]
    assert any("sort" in region.reason for region in fallback)
    assert any("topk" in region.reason for region in fallback)


def test_ahead_of_time_compilation_for_a_named_target(small: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    compiled = sepc.compile(small, target="x86-64-v3", example_inputs=(x,))
    assert "zmm" not in compiled.source(compiled.regions[0], "asm")
    assert agrees(compiled(x), small(x))


def test_unknown_target_lists_the_known_ones(small: nn.Module) -> None:
    with pytest.raises(sepc.TargetError, match=r"x86-64-v5[\s\S]*native[\s\S]*x86-64-v4"):
        sepc.compile(small, target="x86-64-v5")


def test_training_mode_is_refused() -> None:
    with pytest.raises(sepc.ModelError, match="eval"):
        sepc.compile(Small().train())(torch.randn(1, 3, 32, 32))


def test_another_rank_is_refused(small: nn.Module) -> None:
    compiled = sepc.compile(small, example_inputs=(torch.randn(1, 3, 32, 32),))
    with pytest.raises(sepc.InputError, match="3 dimensions, the compiled one has 4"):
        compiled(torch.randn(3, 32, 32))


def test_an_integer_input_where_floats_are_needed_is_refused(small: nn.Module) -> None:
    with pytest.raises(sepc.SepcError, match=r"(?i)float"):
        sepc.compile(small)(torch.zeros(1, 3, 32, 32, dtype=torch.int64))


class Untraceable(nn.Module):
    """Control flow that depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_a_model_that_cannot_be_traced_names_the_users_line() -> None:
    with pytest.raises(sepc.ModelError, match=r"test_compile\.py"):
        sepc.compile(Untraceable().eval())(torch.randn(3))


def test_missing_tvm_is_reported(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sepc.backends")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(sepc.BuildError, match=r"TVM cannot be imported[\s\S]*pip install"):
        sepc.compile(small)(torch.randn(1, 3, 32, 32))


def test_missing_c_compiler_is_reported(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(sepc.BuildError, match="no C compiler"):
        sepc.compile(small)(torch.randn(1, 3, 32, 32))


def test_a_failed_compilation_leaves_the_model_usable(small: nn.Module) -> None:
    compiled = sepc.compile(small)
    with pytest.raises(sepc.SepcError):
        compiled(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
    x = torch.randn(1, 3, 32, 32)
    assert agrees(compiled(x), small(x))
