"""Vector expressions as scalars: what stays a vector of memory, and what CUDA C and OpenCL C get instead of LLVM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.gpu.kernel import BlockFrame, block_function
from sepc.backends.gpu.languages import Language
from sepc.backends.gpu.source import ALIGNED, source_of
from sepc.backends.stages import math
from sepc.backends.stages.kernel import Parameter
from sepc.backends.stages.vector import Accumulator, Expr, constant, prefetch, ramp
from sepc.errors import BuildError

Body = Callable[[Expr, Expr, Expr], None]  # input, output, number of the thread


def source(body: Body, language: Language, aligned: tuple[str, ...] = ("x", "y")) -> str:
    """The source of a kernel of 64 threads from x to y."""

    def emit(frame: BlockFrame) -> None:
        body(frame.buffers["x"], frame.buffers["y"], frame.thread)

    function = block_function([Parameter("x", 512), Parameter("y", 512)], emit, 1, 64)
    text = source_of({"kernel": function.with_attr(ALIGNED, list(aligned))}, language)
    return text[text.rindex("kernel(") :]


def copy(first: Callable[[Expr], Expr]) -> Body:
    return lambda x, y, thread: T.buffer_store(y, x[ramp(first(thread), 4)], [ramp(thread * 4, 4)])


def test_aligned_neighbours_are_loaded_and_stored_together() -> None:
    text = source(copy(lambda thread: thread * 4 + 8), "cuda")
    assert "*(float4*)(x" in text
    assert "*(float4*)(y" in text


@pytest.mark.parametrize(
    ("first", "aligned"),
    [(lambda thread: thread * 4 + 2, ("x", "y")), (lambda thread: thread * 6, ("x", "y")), (lambda t: t * 4, ("y",))],
    ids=["odd offset", "odd stride", "unknown pointer"],
)
def test_what_may_be_misaligned_is_loaded_one_by_one(first: Callable[[Expr], Expr], aligned: tuple[str, ...]) -> None:
    text = source(copy(first), "cuda", aligned)
    assert "(float4*)(x" not in text
    assert "*(float4*)(y" in text


def test_cuda_has_the_pointers_in_order() -> None:
    text = source(copy(lambda thread: thread * 4), "cuda")
    assert text.startswith("kernel(float* __restrict__ x, float* __restrict__ y)")


def test_opencl_adds_the_offset_of_each_pointer() -> None:
    text = source(copy(lambda thread: thread * 4), "opencl")
    assert text.startswith("kernel(__global float* restrict x, int x_offset, __global float* restrict y, int y_offset")
    assert "+ x_offset" in text
    assert "+ y_offset" in text


@pytest.mark.parametrize(("language", "name"), [("cuda", "fmaf("), ("opencl", "fma(")])
def test_fused_multiply_adds_are_called_by_each_languages_name(language: Language, name: str) -> None:
    def body(x: Expr, y: Expr, thread: Expr) -> None:
        T.buffer_store(y, math.exp(T.Bind(x[ramp(thread * 4, 4)])), [ramp(thread * 4, 4)])

    text = source(body, language)
    assert text.count(name) == 4 * 2  # Two in exp, for each lane.
    assert "llvm" not in text


def test_constants_that_opencl_would_print_inexactly_are_given_as_bits() -> None:
    def body(x: Expr, y: Expr, thread: Expr) -> None:
        T.buffer_store(y, x[thread] + tirx.const(12583039.0, "float32") + tirx.const(0.5, "float32"), [thread])

    text = source(body, "opencl")
    assert "as_float(1262485631)" in text
    assert "5.000000e-01f" in text


def test_registers_are_the_threads_own_and_nothing_is_prefetched() -> None:
    def body(x: Expr, y: Expr, thread: Expr) -> None:
        prefetch(x, thread * 4)
        accumulator = Accumulator(4)
        accumulator.set(constant(1, 4))
        T.buffer_store(y, accumulator.value, [ramp(thread * 4, 4)])

    text = source(body, "cuda")
    assert "__shared__" not in text
    assert "prefetch" not in text


def test_an_unknown_call_of_llvm_is_refused() -> None:
    def body(x: Expr, y: Expr, thread: Expr) -> None:
        T.buffer_store(y, tirx.call_llvm_pure_intrin("float32", "llvm.sqrt", x[thread]), [thread])

    with pytest.raises(BuildError, match="LLVM"):
        source(body, "cuda")
