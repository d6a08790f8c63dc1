"""Matrix products made of seven products of their halves."""

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
from sepc.backends.stages.strassen import StrassenStage
from sepc.cost_model import planner, search
from sepc.cost_model.tiling import DenseTiling, StrassenTiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from tests.helpers import Function

# Seen: at most 4e-6 where the plain product has 1e-6.
TOLERANCE = 1e-5
Epilogue = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def always(
    columns: int, panel: tuple[int, ...], blocks: int, panels: int, by_product: bool, step_channels: int = 1
) -> Iterator[None]:
    """Every product is made of seven, in blocks of `columns × panel`, so many blocks and panels per task."""

    def choose(
        stage: Convolution, machine: search.Machine, threads: int, *, mixing: search.Mixing = "pixels", **costs: int
    ) -> search.Choice:
        tiling = StrassenTiling(DenseTiling(columns, panel, 1, blocks, panels, step_channels=step_channels), by_product)
        return search.Choice(tiling, search.predict(stage, tiling, machine, threads, **costs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose", choose)
        yield


def error(layer: nn.Module, x: torch.Tensor, threads: int, target: str = "native") -> float:
    """The largest error of the compiled layer against float64, relative to the largest result."""
    compiled = sepc.compile(layer.eval(), target=target, num_threads=threads)
    with torch.no_grad():
        result, reference = compiled(x), layer.double()(x.double())
        layer.float()
    assert all("seven products" in region.tiling for region in compiled.regions)
    return float((result - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("by_product", [False, True], ids=["by block", "by product"])
def test_inputs_that_are_loaded_several_at_a_time(by_product: bool) -> None:
    with always(5, (8, 8), 2, 1, by_product, step_channels=4):
        assert error(nn.Linear(44, 48), torch.randn(33, 44), 1) < TOLERANCE


@pytest.mark.parametrize("by_product", [False, True], ids=["by block", "by product"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pixels", [2, 13, 40, 57])
@pytest.mark.parametrize("bias", [False, True])
def test_products_agree_with_pytorch_whatever_is_left_over(
    pixels: int, threads: int, by_product: bool, bias: bool
) -> None:
    # 46 channels of a half: one panel of 32 and a tail of 14. 33 input channels of a half: two vectors and a scalar.
    with always(5, (16, 16), 2, 1, by_product):
        assert error(nn.Linear(66, 92, bias), torch.randn(pixels, 66), threads) < TOLERANCE


EPILOGUES: dict[str, Epilogue] = {
    "relu": functional.relu,  # unrolled
    "gelu": functional.gelu,  # once for all columns
}


@pytest.mark.parametrize("by_product", [False, True], ids=["by block", "by product"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues_see_every_result_once(name: str, by_product: bool) -> None:
    layer = Function(lambda self, x, y: EPILOGUES[name](self.layer(x)) + y, layer=nn.Linear(32, 64)).eval()
    x, y = torch.randn(27, 32), torch.randn(27, 64)
    with always(4, (16, 16), 8, 1, by_product), torch.no_grad():
        compiled = sepc.compile(layer, num_threads=2)
        torch.testing.assert_close(compiled(x, y), layer(x, y), rtol=1e-5, atol=1e-5)
        assert len(compiled.regions) == 1


def test_pointwise_convolutions_and_narrower_vectors() -> None:
    x = torch.randn(2, 34, 6, 7).to(memory_format=torch.channels_last)
    for by_product in (False, True):
        with always(3, (8, 8), 3, 2, by_product):
            assert error(nn.Conv2d(34, 72, 1), x, 2, target="x86-64-v3") < TOLERANCE


def test_results_are_the_same_at_every_call_with_two_threads() -> None:
    # The halves of 57 pixels share one, which one of them writes.
    x = torch.randn(57, 64)
    with always(5, (16, 16), 2, 1, True):
        compiled = sepc.compile(nn.Linear(64, 96).eval(), num_threads=2)
        first = compiled(x)
        assert all(torch.equal(compiled(x), first) for _ in range(20))


def test_the_error_of_a_large_product_is_a_few_times_that_of_the_plain_one() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(768, 768), torch.randn(1, 196, 768)
    with torch.no_grad():
        reference = layer.double()(x.double())
        plain = float((layer.float()(x) - reference).abs().max() / reference.abs().max())
    assert error(layer, x, 1) < 10 * plain


def images_apart(x: torch.Tensor) -> torch.Tensor:
    """Which images of the result of a large product are finite if something of the first one is not."""
    layer = nn.Conv2d(256, 256, 1).eval()
    x[0, 3, 4, 5] = torch.inf
    return sepc.compile(layer, num_threads=1)(x).isfinite().all(dim=(1, 2, 3))


def test_what_is_not_finite_stays_in_its_image() -> None:
    assert images_apart(torch.randn(3, 256, 14, 14)).tolist() == [False, True, True]


def test_products_of_one_image_are_made_of_seven_and_of_several_are_not_nor_for_memory() -> None:
    layer, x = nn.Conv2d(256, 256, 1).eval(), torch.randn(2, 256, 14, 14).to(memory_format=torch.channels_last)

    def is_seven(batch: int, **options: Any) -> bool:
        # A core that adds in other units than those that multiply.
        options |= {"target": "x86:znver5", "num_threads": 1}
        (region,) = sepc.compile(layer, example_inputs=(x[:batch],), **options).regions
        return "seven products" in region.tiling

    assert is_seven(1)
    assert not is_seven(2)
    assert not is_seven(1, optimize="memory")


def test_packed_weights_are_the_right_factors_in_the_order_of_their_use() -> None:
    conv = Convolution(1, 1, 4, 1, 4, 4, 40)
    weight = np.arange(160, dtype=np.float32).reshape(40, 4, 1, 1)
    packed = StrassenStage.pack_weights(weight, conv, StrassenTiling(DenseTiling(5, (16,), 1, 1, 1), False))
    assert packed.size == 7 * 2 * 20
    first_panel = packed[: 7 * 2 * 16].reshape(7, 2, 16)
    matrix = weight.reshape(40, 4).T
    np.testing.assert_array_equal(first_panel[0], matrix[:2, :16])  # B11
    np.testing.assert_array_equal(first_panel[1], matrix[2:, :16])  # B21
    np.testing.assert_array_equal(first_panel[6], matrix[2:, 20:36])  # B22


def test_scratch_holds_the_sums_of_a_task_and_the_slots_of_a_block() -> None:
    conv, block = Convolution(1, 1, 40, 1, 40, 64, 64), DenseTiling(5, (16, 16), 1, 2, 1)
    sums = 4 * 10 * 32
    assert StrassenStage.scratch_elements(conv, StrassenTiling(block, False)) == sums + 4 * 5 * 32
    assert StrassenStage.scratch_elements(conv, StrassenTiling(block, True)) == sums + 4 * 10 * 32
    assert ceil_div(conv.out_width, 2) == 20
