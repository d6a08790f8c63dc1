"""3×3 convolutions by Winograd's algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import sepc
from sepc.backends.stages.winograd import WinogradStage
from sepc.cost_model import planner, search
from sepc.cost_model.tiling import DenseTiling, WinogradTiling
from sepc.ir.convolution import Convolution
from tests.helpers import Function

# Seen: at most 7e-6 for tiles of 4×4 results, 1e-6 for 2×2, where plain sums have up to 2e-6.
TOLERANCE = {2: 2e-6, 4: 1.5e-5}


BLOCK = DenseTiling(5, (16, 16), 1, 2, 1)


@contextmanager
def always(outputs: int, by_product: bool, block: DenseTiling = BLOCK) -> Iterator[None]:
    """Every convolution is computed in tiles of `outputs`×`outputs` results."""

    def choose(
        stage: search.Stage, machine: search.Machine, threads: int, *, mixing: search.Mixing = "pixels", **costs: int
    ) -> search.Choice:
        if not isinstance(stage, Convolution):
            return search.choose(stage, machine, threads, **costs)
        tiling = WinogradTiling(block, by_product, outputs)
        return search.Choice(tiling, search.predict(stage, tiling, machine, threads, **costs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose", choose)
        yield


def error(layer: nn.Module, x: torch.Tensor, threads: int = 1, target: str = "native") -> float:
    """The largest error of the compiled layer against float64, relative to the largest result."""
    compiled = sepc.compile(layer.eval(), target=target, num_threads=threads)
    with torch.no_grad():
        result, reference = compiled(x), layer.double()(x.double())
        layer.float()
    assert all("tiles of" in region.tiling for region in compiled.regions if region.kind == "convolution")
    return float((result - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("by_product", [False, True], ids=["by block", "by product"])
@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize(
    ("size", "padding", "threads", "bias"),
    [((8, 8), 1, 1, True), ((7, 13), 1, 3, False), ((9, 6), 0, 1, True), ((5, 5), 3, 2, True), ((3, 3), 0, 1, False)],
    ids=str,
)
def test_tiles_agree_with_pytorch_whatever_is_left_over(
    size: tuple[int, int], padding: int, threads: int, bias: bool, outputs: int, by_product: bool
) -> None:
    # 46 output channels: one panel of 32 and a tail of 14. 33 input channels: two vectors and a scalar. Two images.
    x = torch.randn(2, 33, *size).to(memory_format=torch.channels_last)
    with always(outputs, by_product):
        assert error(nn.Conv2d(33, 46, 3, padding=padding, bias=bias), x, threads) < TOLERANCE[outputs]


def test_contiguous_inputs_and_narrower_vectors() -> None:
    x = torch.randn(2, 20, 9, 10)
    for outputs in (2, 4):
        with always(outputs, True, DenseTiling(3, (8, 8), 1, 3, 2)):
            assert error(nn.Conv2d(20, 72, 3, padding=1), x, 2, target="x86-64-v3") < TOLERANCE[outputs]


@pytest.mark.parametrize("by_product", [False, True], ids=["by block", "by product"])
def test_inputs_that_are_loaded_several_at_a_time(by_product: bool) -> None:
    x = torch.randn(1, 22, 9, 10)
    with always(2, by_product, DenseTiling(3, (8, 8), 1, 3, 2, step_channels=8)):
        assert error(nn.Conv2d(22, 40, 3, padding=1), x) < TOLERANCE[2]


EPILOGUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": functional.relu, "gelu": functional.gelu}


@pytest.mark.parametrize("by_product", [False, True], ids=["by block", "by product"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues_see_every_result(name: str, by_product: bool) -> None:
    layer = Function(lambda self, x, y: EPILOGUES[name](self.layer(x)) + y, layer=nn.Conv2d(16, 40, 3, padding=1))
    x, y = torch.randn(1, 16, 7, 9), torch.randn(1, 40, 7, 9)
    with always(4, by_product), torch.no_grad():
        compiled = sepc.compile(layer.eval(), num_threads=2)
        torch.testing.assert_close(compiled(x, y), layer(x, y), rtol=1e-5, atol=1e-5)
        assert len([region for region in compiled.regions if region.kind == "convolution"]) == 1


def chosen(layer: nn.Module, x: torch.Tensor, **options: Any) -> list[str]:
    """The tilings of the convolutions of a layer."""
    compiled = sepc.compile(layer.eval(), num_threads=1, example_inputs=(x,), **options)
    return [region.tiling for region in compiled.regions if region.kind == "convolution"]


def test_dense_convolutions_are_computed_in_tiles_of_batches_too_and_not_for_memory() -> None:
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(2, 64, 28, 28).to(memory_format=torch.channels_last)
    assert all("tiles of 4×4" in tiling for tiling in chosen(layer, x) + chosen(layer, x[:1]))
    assert not any("tiles of" in tiling for tiling in chosen(layer, x, optimize="memory"))


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel_size": 5}, {"kernel_size": (3, 1)}], ids=str
)
def test_other_convolutions_are_not(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(64, 64, **{"kernel_size": 3, "padding": 1, **options})
    assert not any("tiles of" in tiling for tiling in chosen(layer, torch.randn(1, 64, 28, 28)))


def test_what_is_not_finite_stays_in_its_tile() -> None:
    x = torch.randn(2, 16, 16, 16)
    x[0, 3, 9, 9] = torch.inf
    with always(4, True):
        finite = sepc.compile(nn.Conv2d(16, 16, 3, padding=1).eval(), num_threads=1)(x).isfinite().all(dim=1)
    assert finite[1].all()
    expected = torch.ones(16, 16, dtype=torch.bool)
    # Inputs of the tiles from row and column 8 on are those from 7 to 12; 9 is also the neighbours' 9th and no other's.
    expected[8:12, 8:12] = False
    assert torch.equal(finite[0], expected)


def test_packed_weights_are_transformed_filters_in_the_order_of_their_use() -> None:
    conv = Convolution(1, 8, 8, 8, 8, 4, 40, 1, (3, 3), (1, 1), (1, 1))
    weight = np.random.default_rng(0).standard_normal((40, 4, 3, 3)).astype(np.float32)
    packed = WinogradStage.pack_weights(weight, conv, WinogradTiling(DenseTiling(5, (16,), 1, 1, 1), True, 2))
    assert packed.size == 16 * 4 * 40
    first_panel = packed[: 16 * 4 * 16].reshape(4, 4, 4, 16)
    # The point 0 takes the filter's corner, infinity the opposite one.
    np.testing.assert_allclose(first_panel[0, 0], weight[:16, :, 0, 0].T, rtol=1e-6)
    np.testing.assert_allclose(first_panel[3, 3], weight[:16, :, 2, 2].T, rtol=1e-6)


def test_scratch_holds_the_inputs_of_a_task_and_the_products_of_a_block_or_a_task() -> None:
    conv, block = Convolution(1, 8, 8, 8, 8, 4, 40, 1, (3, 3), (1, 1), (1, 1)), DenseTiling(5, (16,), 1, 2, 1)
    line = 16  # 16 tiles: a task has two blocks of 5, the last one also the tile left over
    assert WinogradStage.scratch_elements(conv, WinogradTiling(block, False, 2)) == 16 * (11 * 4 + line + 5 * 16 + line)
    assert WinogradStage.scratch_elements(conv, WinogradTiling(block, True, 2)) == 16 * (11 * 4 + line + 11 * 16 + line)
