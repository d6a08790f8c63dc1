"""The runtime: the entry point in C, what a program is made of, arenas, and numbers of the profile."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc.backends.build import entry_source, link
from sepc.c_compiler import c_compiler
from sepc.compiled import CompiledModel
from sepc.errors import BuildError
from sepc.runtime.executable import HUGE_PAGE_BYTES, aligned_bytes
from sepc.runtime.program import ARENA, FIRST_INPUT, HostCall, KernelCall, Pointer, Program
from tests.helpers import Function

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))

# Two kernels by hand: each thread adds its share to a sum of integers, the second one doubles what the first has left.
KERNELS = """
#include <stdint.h>
int32_t fill(void* out, int32_t thread, int32_t threads) {
  for (int i = thread; i < 64; i += threads) ((int*)out)[i] = i;
  return 0;
}
int32_t twice(void* in, void* out, int32_t thread, int32_t threads) {
  for (int i = thread; i < 64; i += threads) ((int*)out)[i] = 2 * ((int*)in)[63 - i];
  return 0;
}
"""
PARAMETERS = {"fill": 1, "twice": 2}


def fill(block: int, number: int) -> KernelCall:
    return KernelCall("fill", (Pointer(block, 0),), number)


def twice(source: int, target: int, number: int) -> KernelCall:
    return KernelCall("twice", (Pointer(source, 0), Pointer(target, 256)), number)


@pytest.mark.parametrize("size_bytes", [0, 1, 100, 4096, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 5])
def test_memory_starts_at_a_line_and_large_memory_at_a_large_page(size_bytes: int) -> None:
    memory = aligned_bytes(size_bytes)
    assert memory.numel() == size_bytes or size_bytes == 0
    assert memory.data_ptr() % (HUGE_PAGE_BYTES if size_bytes >= HUGE_PAGE_BYTES else 64) == 0
    memory.fill_(7)  # all of it is there
    assert memory.eq(7).all()
    assert not memory.is_inference()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_entry_point_runs_segments_kernel_after_kernel(tmp_path: Path, threads: int) -> None:
    (tmp_path / "kernels.c").write_text(KERNELS)
    command = [c_compiler(), "-fPIC", "-c", str(tmp_path / "kernels.c"), "-o", str(tmp_path / "kernels.o")]
    subprocess.run(command, check=True)
    segments = [[fill(0, 0), twice(0, 1, 1)], [fill(1, 2)]]
    library = ctypes.CDLL(str(link([tmp_path / "kernels.o"], entry_source(segments, PARAMETERS), tmp_path)))
    first, second = torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    table = (ctypes.c_void_p * 2)(first.data_ptr(), second.data_ptr())
    stamps = (ctypes.c_double * 4)()
    library.sepc_run(0, table, threads, stamps, 0)
    numbers = torch.arange(64, dtype=torch.int32)
    assert torch.equal(first[:64], numbers)
    assert torch.equal(second[64:], 2 * numbers.flip(0))
    assert 0 < stamps[0] <= stamps[1] <= stamps[2]
    assert stamps[3] == 0
    library.sepc_run(1, table, threads, None, 2)
    assert torch.equal(second[:64], numbers)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_entry_point_of_any_number_of_segments_compiles(tmp_path: Path, count: int) -> None:
    segments = [[fill(0, number)] for number in range(count)]
    source = entry_source(segments, PARAMETERS if count else {})
    assert len(re.findall(r"^static void segment_\d+", source, re.MULTILINE)) == count
    (tmp_path / "entry.c").write_text(source)
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-fopenmp", "-fsyntax-only"]
    subprocess.run([c_compiler(), *flags, str(tmp_path / "entry.c")], check=True)


def test_each_kernel_is_declared_once_with_its_pointers_and_two_numbers() -> None:
    source = entry_source([[fill(0, 0), twice(0, 1, 1), fill(1, 2)]], PARAMETERS)
    assert source.count("int32_t fill(void*, int32_t, int32_t);") == 1
    assert source.count("int32_t twice(void*, void*, int32_t, int32_t);") == 1
    assert "twice(b[0] + 0, b[1] + 256, t, n);" in source
    assert source.count("omp barrier") == 3


def test_a_failing_link_says_what_the_compiler_said(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="could not be linked"):
        link([], "this is no C", tmp_path)


def test_the_c_compiler_is_cc_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert Path(c_compiler()).name in ("cc", "gcc", "clang")
    monkeypatch.setenv("CC", "gcc")
    assert c_compiler() == shutil.which("gcc")


# ---- programs of whole models


def mixed() -> CompiledModel:
    """Kernels, then PyTorch, then kernels: two segments and a host call."""
    model = Function(lambda self, x: torch.relu(self.conv(x).cumprod(1)) + 1, conv=nn.Conv2d(4, 4, 3, padding=1))
    return sepc.compile(model.eval(), example_inputs=(X,))


def program_of(compiled: CompiledModel) -> Program:
    return compiled._current().executable.program


def test_a_host_call_splits_segments() -> None:
    program = program_of(mixed())
    kinds = [type(step) for step in program.steps]
    assert kinds == [list, HostCall, list]
    assert len(program.segments) == 2
    calls = [call for step in program.steps for call in (step if isinstance(step, list) else [step])]
    assert [call.number for call in calls] == list(range(program.number_of_calls))


def test_kernels_have_as_many_parameters_as_arguments_and_stay_in_their_blocks() -> None:
    compiled = mixed()
    program, functions = program_of(compiled), compiled._last().lowered.functions
    pointers = {name: len(function.params) - 2 for name, function in functions.items()}  # beside thread and threads
    sizes = {ARENA: program.arena_bytes, FIRST_INPUT: X.numel() * 4}
    for segment in program.segments:
        for call in segment:
            assert len(call.arguments) == pointers[call.symbol]
            assert all(0 <= one.offset_bytes < sizes.get(one.block, 1 << 30) for one in call.arguments)
    assert {call.symbol for segment in program.segments for call in segment} == set(functions)


def test_equal_kernels_are_compiled_once() -> None:
    layers = [nn.Linear(8, 8) for _ in range(4)]
    compiled = sepc.compile(nn.Sequential(*layers).eval(), example_inputs=(torch.randn(5, 8),))
    symbols = [one.symbols for one in compiled.regions]
    assert len(symbols) == 4
    assert len(set(symbols)) == 1


def test_profile_has_a_positive_time_for_every_region_also_of_pytorch() -> None:
    compiled = mixed()
    profile = compiled.profile(X, repeats=5)
    assert [row.name for row in profile] == [one.name for one in compiled.regions]
    assert all(0 < row.measured_us < 1e6 for row in profile)


def test_an_arena_made_in_inference_mode_serves_later_calls() -> None:
    compiled = mixed()
    with torch.inference_mode():
        inside = compiled(X)
    assert torch.equal(compiled(X), inside)


def test_arenas_are_kept_and_reused() -> None:
    compiled = mixed()
    executable = compiled._current().executable
    for _ in range(3):
        compiled(X)
    assert len(executable._workspaces) == 1
    assert executable._workspaces[0].arena.data_ptr() % 64 == 0
    assert executable._workspaces[0].arena.numel() == compiled.arena_bytes


class ManyResults(torch.nn.Module):
    """Results that have their storage for themselves, that share one, and that are a part of one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, z = x.relu(), x.sigmoid()
        return y, z.flatten(), z, (x + 1)[:, 1:], x.exp().transpose(2, 3)


def test_results_have_the_strides_and_share_the_memory_that_they_do_in_pytorch() -> None:
    model = ManyResults().eval()
    compiled = sepc.compile(model, example_inputs=(X,))
    whole = [isinstance(one, int) for one in compiled._current().executable._results]
    assert whole == [True, False, False, False, True]
    for _ in range(2):  # The second call is the usual one.
        found, expected = compiled(X), model(X)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert [one.stride() for one in found] == [one.stride() for one in expected]
        assert found[1].data_ptr() == found[2].data_ptr()
        assert [one.storage_offset() for one in found] == [one.storage_offset() for one in expected]


def test_a_call_like_the_last_one_is_not_looked_up_again() -> None:
    compiled = mixed()
    expected = compiled(X)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_resolve", None)
        assert torch.equal(compiled(X.clone()), expected)
        with pytest.raises(TypeError):
            compiled(X.to(memory_format=torch.channels_last))
