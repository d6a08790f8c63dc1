"""Which tensors dense blocks fetch: those behind the second level, where steps are few enough to gain by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sepc.cost_model.chain import choose_chain
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import choose
from sepc.cost_model.tiling import ChainTiling, DenseTiling, LaneTiling, Tensor
from sepc.ir.convolution import Convolution
from sepc.ir.depth import Depth
from sepc.ir.stage import Chain

ZEN5 = Machine.load("znver5")  # A quarter of its second level is 256 KiB.


def pointwise(size: int, inputs: int, outputs: int, stride: int = 1) -> Convolution:
    return Convolution(1, size, size, size // stride, size // stride, inputs, outputs, stride=(stride, stride))


def fetched(conv: Convolution, operand_bytes: int = 0, threads: int = 1) -> tuple[Tensor, ...]:
    tiling = choose(conv, ZEN5, threads, operand_bytes=operand_bytes, mixing="nothing").tiling
    assert isinstance(tiling, DenseTiling)
    return tiling.fetched


def test_large_inputs_operands_and_results_are_fetched() -> None:
    assert fetched(pointwise(56, 256, 16)) == ("input",)
    assert fetched(pointwise(28, 64, 256), operand_bytes=4 * 28 * 28 * 256) == ("operands", "results")
    assert fetched(pointwise(56, 256, 64, stride=2)) == ("input",)
    assert fetched(pointwise(56, 64, 64)) == ("input", "results")


def test_tensors_that_are_in_the_cache_are_not() -> None:
    assert fetched(pointwise(14, 256, 256), operand_bytes=4 * 14 * 14 * 256) == ()


def test_what_each_of_several_threads_touches_is_compared_with_its_own_cache() -> None:
    assert fetched(pointwise(28, 64, 128), threads=1) == ("results",)
    assert fetched(pointwise(28, 64, 128), threads=2) == ()


def test_the_input_is_not_fetched_by_many_panels_or_several_taps() -> None:
    assert "input" in fetched(pointwise(28, 512, 512))
    assert "input" not in fetched(pointwise(28, 512, 528))
    assert "input" not in fetched(Convolution(1, 56, 56, 56, 56, 256, 64, kernel=(3, 3), padding=(1, 1)))


def test_results_of_many_products_are_not_fetched() -> None:
    large = 4 * 28 * 28 * 1024
    assert fetched(pointwise(28, 512, 1024), large) == ("operands", "results")
    assert fetched(pointwise(28, 528, 1024), large) == ()


def test_only_dense_blocks_of_images_on_x86_fetch() -> None:
    depthwise = Convolution(1, 56, 56, 56, 56, 144, 144, 144, (3, 3), padding=(1, 1))
    assert isinstance(choose(depthwise, ZEN5, 1).tiling, LaneTiling)
    volume = replace(pointwise(56, 64, 64), depth=Depth(1, 1))
    assert fetched(volume) == ()
    on_arm = choose(pointwise(56, 64, 64), Machine.load("neoverse-n1"), 1, mixing="nothing").tiling
    assert isinstance(on_arm, DenseTiling)
    assert on_arm.fetched == ()


def test_of_a_chain_the_first_link_fetches_inputs_and_the_last_one_results() -> None:
    expand, project = pointwise(56, 64, 144), pointwise(56, 144, 64)
    depthwise = Convolution(1, 56, 56, 56, 56, 144, 144, 144, (3, 3), padding=(1, 1))
    choice = choose_chain(
        Chain((expand, depthwise, project)), ZEN5, 1, epilogue_costs=(0, 0, 0), operand_bytes=4 * 56 * 56 * 64
    )
    assert isinstance(choice.tiling, ChainTiling)
    first, _, last = choice.tiling.links
    assert isinstance(first, DenseTiling)
    assert isinstance(last, DenseTiling)
    assert (first.fetched, last.fetched) == (("input",), ("operands", "results"))


@pytest.mark.parametrize(
    ("tensors", "text"),
    [((), ""), (("input",), ", fetching input"), (("operands", "results"), ", fetching operands and results")],
)
def test_it_is_told(tensors: tuple[Tensor, ...], text: str) -> None:
    assert str(DenseTiling(14, (16, 16), 1, 4, 2, fetched=tensors)).endswith(f"task 1 rows × 4 blocks × 2 panels{text}")
