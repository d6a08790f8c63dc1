"""What blocks fetch: all that is to be fetched, and not much more; into the outer caches what is for later kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sepc.backends.regions import lower
from sepc.backends.stages import fetching, vector
from sepc.backends.stages.fetching import AheadShare, Fetched, PixelShare, Visit, WeightShare
from sepc.backends.stages.vector import Operand, Ring
from sepc.cost_model.tiling import Ahead, DenseTiling, Tensor
from sepc.ir import region
from sepc.passes.choose_tiling import choice, region_problem
from tests.helpers import passes_until

LINE = 16


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[bool, set[int]]:
    """The lines that are fetched, into the outer caches and into all."""
    found: dict[bool, set[int]] = {False: set(), True: set()}

    def prefetch(weight: object, index: int, *, outer: bool = False) -> None:
        found[outer].add(index // LINE)

    monkeypatch.setattr(fetching, "prefetch", prefetch)
    monkeypatch.setattr(fetching, "line_elements", lambda weight: LINE)
    monkeypatch.setattr(fetching, "element_bytes", lambda weight: 4)
    return found


@pytest.mark.parametrize("columns", [1, 7, 10])
@pytest.mark.parametrize("fetched_elements", [1000, 16 * 4321, 500_000])
def test_the_blocks_of_a_kernel_together_fetch_all_that_lies_ahead(
    lines: dict[bool, set[int]], fetched_elements: int, columns: int
) -> None:
    panels, pixels, steps, elements = 5, 49, 32, 5 * 32 * 16
    ahead = Ahead(4 * fetched_elements, skipped_bytes=4 * 160)
    for panel in range(panels):
        share = AheadShare(ahead, elements, panels * pixels, panel * pixels, columns, steps)
        for start in range(0, pixels, columns):
            for step in range(steps):
                share.prefetch(None, step, start)
    first = (elements + 160) // LINE
    wanted = set(range(first, first + fetched_elements // LINE))
    assert wanted <= lines[True]
    most = panels * pixels * steps  # Each step rounds up to an element, and the last block has columns to spare.
    assert max(lines[True]) <= max(wanted) + most // LINE + 1 + columns * fetched_elements // (panels * pixels * LINE)
    assert not lines[False]


def test_the_blocks_that_read_a_panel_together_fetch_the_next_one(lines: dict[bool, set[int]]) -> None:
    pixels, columns, steps, elements = 49, 7, 32, 32 * 48
    share = WeightShare(Visit(pixels, 0), columns, elements, steps, panel=elements)
    for start in range(0, pixels, columns):
        for step in range(steps):
            share.prefetch(None, step, start)
    assert set(range(2 * elements // LINE, 3 * elements // LINE)) <= lines[False]
    assert not lines[True]


@pytest.fixture
def pixel_lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The first element of each fetched line of a tensor, and whether it is to be written."""
    found: list[tuple[int, bool]] = []

    def prefetch(buffer: object, index: int, *, outer: bool = False, write: bool = False) -> None:
        assert not outer
        found.append((index, write))

    monkeypatch.setattr(vector, "prefetch", prefetch)
    for module in (vector, fetching):
        monkeypatch.setattr(module, "line_elements", lambda buffer: LINE)
    return found


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("apart", [1, 2])
@pytest.mark.parametrize("steps", [1, 7, 28, 64, 500])
def test_a_block_fetches_each_line_of_its_pixels_and_no_other(
    pixel_lines: list[tuple[int, bool]], steps: int, apart: int, write: bool
) -> None:
    pixels, channels, pixel_stride, row_stride = 7, 40, 96, 56 * 96
    tensor = Fetched(Operand(None, (0, row_stride, pixel_stride, 1), offset=32), write)
    share = PixelShare(tensor, (0, 3, 10, 48), pixels, channels, steps, apart)
    for step in range(steps):
        share.prefetch(step)
    first = 32 + 3 * row_stride + 10 * pixel_stride + 48
    wanted = {first + pixel * apart * pixel_stride + line for pixel in range(pixels) for line in (0, 16, 32)}
    fetched = {index for index, _ in pixel_lines}
    assert wanted <= fetched
    if steps >= len(wanted):
        assert fetched == wanted
        assert len(pixel_lines) == steps
    assert {written for _, written in pixel_lines} == {write}


@pytest.mark.parametrize(
    "operand",
    [
        pytest.param(Operand(None, (0, 56, 1, 3136)), id="channels apart"),
        pytest.param(Operand(None, (0, 0, 0, 1)), id="one value per channel"),
        pytest.param(Operand(None, (0, 56, 1, 0)), id="one value per pixel"),
        pytest.param(Ring(None, (0, 56 * 96, 96, 1), rows=4), id="in the caches"),
    ],
)
def test_nothing_is_fetched_of(pixel_lines: list[tuple[int, bool]], operand: Operand) -> None:
    PixelShare(Fetched(operand), (0, 0, 0, 0), 7, 32, 64).prefetch(0)
    assert not pixel_lines


@pytest.mark.parametrize(
    ("tensors", "reads", "writes"),
    [
        ((), 0, 0),
        (("input",), 1, 0),
        (("operands",), 1, 0),
        (("results",), 0, 1),
        (("input", "operands", "results"), 2, 1),
    ],
)
def test_a_kernel_fetches_the_tensors_that_its_tiling_says(
    tensors: tuple[Tensor, ...], reads: int, writes: int
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(32, 64, 1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.convolution(x) + y

    inputs = tuple(torch.zeros(1, n, 8, 8).to(memory_format=torch.channels_last) for n in (32, 64))
    module, _ = passes_until("choose-tiling", Block().eval(), *inputs)
    ((node, graph),) = list(region.regions(module))
    tiling = choice(node).tiling
    assert isinstance(tiling, DenseTiling)

    def count(tensors: tuple[Tensor, ...]) -> tuple[int, int]:
        """How many instructions fetch lines to read, and to write."""
        (kernel,) = lower(graph, region_problem(node, graph), replace(tiling, fetched=tensors), lanes=8)
        lines = [line for line in str(kernel.function).splitlines() if "llvm.prefetch" in line]
        written = sum(line.rstrip().endswith(", 1, 3, 1)") for line in lines)
        return len(lines) - written, written

    # Blocks in the row's middle and at its end, each with a first step and the others, which fetch weights anyway.
    plain_reads, plain_writes = count(())
    assert (plain_reads, plain_writes) == (4, 0)
    assert count(tensors) == (plain_reads + 4 * reads, 4 * writes)
