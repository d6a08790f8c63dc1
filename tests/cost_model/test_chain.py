"""Cost and tiling of chains: rows of the window, ring buffers, traffic, and when fusing is predicted to pay."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from sepc.cost_model.chain import LEAST_STEPS, STEPS, choose_chain, predict_chain, stage_blocks
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import choose
from sepc.cost_model.tiling import ChainTiling
from sepc.ir.convolution import Convolution
from sepc.ir.stage import Chain, Map, Stage

ZEN5 = Machine.load("znver5")


def convolution(
    size: int, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, dilation: int = 1
) -> Convolution:
    """A convolution of square images, padded by half of its window."""
    pad = dilation * (kernel // 2)
    out = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    return Convolution(
        1, size, size, out, out, inputs, outputs, groups, (kernel,) * 2, (stride,) * 2, (pad,) * 2, (dilation,) * 2
    )


def inverted_residual(size: int, inputs: int, inner: int, outputs: int, stride: int = 1, kernel: int = 3) -> Chain:
    """1×1, depthwise, 1×1."""
    expand = convolution(size, inputs, inner)
    depth = convolution(size, inner, inner, kernel, stride, groups=inner)
    return Chain((expand, depth, convolution(depth.out_height, inner, outputs)))


def alone_us(chain: Chain, machine: Machine, threads: int = 1) -> float:
    """Predicted time of the links as kernels of their own."""
    barrier_us = machine.barrier_us if threads > 1 else 0.0
    return sum(choose(link, machine, threads).cost.time_us + barrier_us for link in chain.links)


def fused_us(chain: Chain, machine: Machine, threads: int = 1) -> float:
    """Predicted time of the chain as one kernel."""
    barrier_us = machine.barrier_us if threads > 1 else 0.0
    costs = (0,) * len(chain.links)
    return choose_chain(chain, machine, threads, epilogue_costs=costs).cost.time_us + barrier_us


# ---- rows and rings


def rows_read(link: Convolution, rows: range) -> range:
    """The rows of its input that `link` reads for neighbouring rows of its output, from the definition."""
    taps = [
        row * link.stride[0] - link.padding[0] + tap * link.dilation[0] for row in rows for tap in range(link.kernel[0])
    ]
    inside = [row for row in taps if 0 <= row < link.in_height]
    return range(min(inside), max(inside) + 1) if inside else range(0)


def test_rows_agree_with_brute_force() -> None:
    generator = random.Random(0)
    for _ in range(200):
        size, links = generator.randint(20, 40), []
        for _ in range(generator.randint(1, 4)):
            kernel, stride = generator.choice([1, 2, 3, 5]), generator.choice([1, 1, 2])
            links.append(convolution(size, 4, 4, kernel, stride, dilation=generator.choice([1, 1, 2])))
            size = links[-1].out_height
        chain = Chain(tuple(links))
        rows = generator.randint(1, size)
        most = [0] * len(links)
        for first in range(size - rows + 1):
            needed = range(first, first + rows)
            for index in reversed(range(len(links))):
                most[index] = max(most[index], len(needed))
                needed = rows_read(links[index], needed)
        given = chain.rows_for(rows)
        assert all(given[index] >= most[index] for index in range(len(links))), chain
        # Somewhere inside of the image nothing is cut off, unless the image is too small for that.
        reach = [count for count, link in zip(given, links, strict=True) if count < link.out_height // 2]
        assert not reach or given[-1] == most[-1]


def test_rows_of_an_inverted_residual() -> None:
    chain = inverted_residual(56, 16, 96, 24, stride=2)
    assert chain.rows_for(1) == (3, 1, 1)
    assert chain.rows_for(4) == (9, 4, 4)
    assert chain.rows_for(28) == (56, 28, 28)  # not more than there are


def test_rings_hold_what_one_turn_reads() -> None:
    chain = inverted_residual(56, 16, 96, 24)
    assert chain.ring_elements(1) == (3 * 56 * 96, 1 * 56 * 96)
    assert chain.ring_elements(4) == (6 * 56 * 96, 4 * 56 * 96)
    assert Chain(chain.links[:1]).ring_elements(4) == ()


# ---- the choice


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("name", ["znver5", "x86-64-v3", "cortex-a72", "neoverse-v1"])
def test_the_choice_is_legal_and_the_best_of_those_tried(name: str, threads: int) -> None:
    chain, machine = inverted_residual(56, 24, 144, 32, stride=2), Machine.load(name)
    choice = choose_chain(chain, machine, threads, epilogue_costs=(2, 2, 1))
    tiling = choice.tiling
    assert isinstance(tiling, ChainTiling)
    assert 1 <= tiling.step <= tiling.rows <= 28
    assert choice.cost == predict_chain(chain, tiling, machine, threads, (2, 2, 1))
    for rows, step in itertools.product((28, 14, 7), STEPS):
        if threads == 1 and rows == 28:
            other = predict_chain(chain, ChainTiling(tiling.links, rows, step), machine, threads, (2, 2, 1))
            assert choice.cost.time_us <= other.time_us


def test_for_memory_the_window_is_the_smallest() -> None:
    chain = inverted_residual(112, 16, 96, 24)
    tiling = choose_chain(chain, ZEN5, 2, epilogue_costs=(0, 0, 0), objective="memory").tiling
    assert isinstance(tiling, ChainTiling)
    assert (tiling.step,) == LEAST_STEPS


def test_fusing_pays_where_the_inner_tensors_exceed_the_caches() -> None:
    # Measured on one core with AVX-512 and 32 MiB of last cache: 20.9 ms alone, 10.2 ms fused.
    chain = inverted_residual(448, 16, 96, 24, stride=2)
    assert alone_us(chain, ZEN5) > 1.3 * fused_us(chain, ZEN5)


@pytest.mark.parametrize(("size", "channels"), [(14, 96), (7, 160)])
def test_fusing_tiny_maps_pays_little_where_the_caches_are_large(size: int, channels: int) -> None:
    chain = inverted_residual(size, channels, 6 * channels, channels)
    assert alone_us(chain, ZEN5) < 1.1 * fused_us(chain, ZEN5)


def test_fewer_bytes_are_predicted_where_the_inner_tensor_exceeds_the_last_cache() -> None:
    chain = inverted_residual(448, 16, 96, 24, stride=2)
    inner_bytes = 4 * 96 * 448**2
    assert inner_bytes > ZEN5.last_cache.size_bytes
    alone = sum(dict(choose(link, ZEN5, 1).cost.bytes_per_level)["DRAM"] for link in chain.links)
    cost = choose_chain(chain, ZEN5, 1, epilogue_costs=(0, 0, 0)).cost
    fused = dict(cost.bytes_per_level)["DRAM"]
    assert alone - fused > 1.5 * inner_bytes  # written once, read once; hits count in part
    assert fused < 1.5 * cost.bytes_moved
    assert cost.flops == chain.flops


def test_compulsory_bytes_are_the_ends_and_the_weights() -> None:
    chain = inverted_residual(32, 8, 48, 16)
    tiling = choose_chain(chain, ZEN5, 1, epilogue_costs=(0, 0, 0)).tiling
    assert isinstance(tiling, ChainTiling)
    whole = ChainTiling(tiling.links, 32, 1)
    weights = 8 * 48 + 48 + 48 * 9 + 48 + 48 * 16 + 16
    moved = predict_chain(chain, whole, ZEN5, 1, (0, 0, 0)).bytes_moved
    assert moved == 4 * (32 * 32 * 8 + weights + 32 * 32 * 16)


def test_operands_count() -> None:
    chain = inverted_residual(32, 8, 48, 8)
    with_residual = choose_chain(chain, ZEN5, 1, epilogue_costs=(0, 0, 1), operand_bytes=32 * 32 * 8 * 4).cost
    assert with_residual.bytes_moved > choose_chain(chain, ZEN5, 1, epilogue_costs=(0, 0, 1)).cost.bytes_moved


# ---- degenerate shapes


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["znver5", "x86-64-v3", "cortex-a53"])
@pytest.mark.parametrize(
    "chain",
    [
        inverted_residual(1, 960, 960, 320),
        inverted_residual(1, 1, 1, 1),
        inverted_residual(5, 1, 1, 1, stride=2),
        inverted_residual(3, 8, 48, 8, kernel=7),
        inverted_residual(2, 3, 7, 5, kernel=5, stride=2),
        Chain((convolution(4, 8, 8, 3, 1, groups=8, dilation=6), convolution(4, 8, 8))),
        Chain(tuple(convolution(9, 4, 4, 3, 1, groups=4) for _ in range(6))),
    ],
    ids=["1×1 map", "1 channel on a 1×1 map", "1 channel", "7×7 on 3×3", "5×5 on 2×2", "dilated", "six links"],
)
def test_degenerate_shapes_do_not_crash(chain: Chain, name: str, threads: int) -> None:
    choice = choose_chain(chain, Machine.load(name), threads, epilogue_costs=(1,) * len(chain.links))
    assert math.isfinite(choice.cost.time_us)
    assert choice.cost.time_us > 0
    assert all(rows >= 1 for rows in chain.rows_for(1))


def test_a_batch_of_0_is_refused() -> None:
    empty = dataclasses.replace(convolution(8, 4, 4, 3), batch=0)
    with pytest.raises(ValueError, match="computes nothing"):
        choose(empty, ZEN5, 1)
    with pytest.raises(ValueError, match="computes nothing"):
        choose_chain(Chain((empty, empty)), ZEN5, 1, epilogue_costs=(0, 0))


def test_neighbouring_tasks_share_their_halo() -> None:
    chain = Chain((convolution(56, 48, 48, 3, groups=48), convolution(56, 48, 24)))
    tiling = choose_chain(chain, ZEN5, 1, epilogue_costs=(0, 0)).tiling
    assert isinstance(tiling, ChainTiling)
    moved = [
        predict_chain(chain, ChainTiling(tiling.links, rows, 2), ZEN5, 1, (0, 0)).bytes_moved for rows in (56, 14, 4)
    ]
    compulsory = 4 * 56 * 56 * (48 + 24) + 4 * (48 * 10 + 24 * 49)
    assert moved == [compulsory] * 3


def test_a_chain_whose_weights_do_not_stay_reads_them_every_turn() -> None:
    chain = inverted_residual(14, 96, 384, 96)
    links = choose_chain(chain, ZEN5, 1, epilogue_costs=(0,) * 3).tiling
    assert isinstance(links, ChainTiling)
    small = dataclasses.replace(
        ZEN5, levels=(ZEN5.levels[0], dataclasses.replace(ZEN5.levels[1], size_bytes=1 << 18), ZEN5.dram)
    )
    behind = [
        predict_chain(chain, ChainTiling(links.links, 14, step), small, 1, (0,) * 3).bytes_per_level[-1][1]
        for step in (1, 2)
    ]
    weights = 4 * (2 * 96 * 384)
    assert behind[0] > 13 * weights  # one turn per row
    assert behind[0] > 1.4 * behind[1]


# ---- closed forms


def moved(first: Stage, second: Stage, rows: int, step: int, cache_bytes: int) -> float:
    """Bytes of a chain of two through a cache of that size, on one thread."""
    blocks = tuple(stage_blocks(link, ZEN5)[0] for link in (first, second))
    chain, tiling = Chain((first, second)), ChainTiling(blocks, rows, step)
    levels = (ZEN5.levels[0], dataclasses.replace(ZEN5.levels[1], size_bytes=cache_bytes), ZEN5.dram)
    cost = predict_chain(chain, tiling, dataclasses.replace(ZEN5, levels=levels), 1, (0, 0))
    return cost.bytes_per_level[-1][1]


POINT = Convolution(1, 64, 64, 64, 64, 24, 96)
DEPTH = Convolution(1, 64, 64, 64, 64, 96, 96, 96, (3, 3), (1, 1), (1, 1))
BACK = Convolution(1, 64, 64, 64, 64, 96, 24)
NARROW = Convolution(1, 64, 64, 64, 64, 24, 24, 24, (3, 3), (1, 1), (1, 1))
HELD = 1 << 18  # holds a window and the weights, but not the images


@pytest.mark.parametrize(
    ("first", "second", "in_channels", "out_channels"),
    [
        pytest.param(POINT, DEPTH, 24, 96, id="pointwise, depthwise"),
        pytest.param(NARROW, POINT, 24, 96, id="depthwise, pointwise"),
        pytest.param(POINT, BACK, 24, 24, id="pointwise, pointwise"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_pair_whose_window_fits_moves_its_input_and_output_once(
    first: Convolution, second: Convolution, in_channels: int, out_channels: int, parts: int
) -> None:
    """Input + output: with tasks that follow each other on one thread, halos and weights are still there."""
    expected = 4 * 64 * 64 * (in_channels + out_channels)
    assert moved(first, second, 64 // parts, 1, HELD) == pytest.approx(expected)


def test_threads_read_the_halo_between_their_tasks_twice() -> None:
    """Two threads, each with half of the rows: (k − 1) / 2 rows of the input beyond its own."""
    blocks = tuple(stage_blocks(link, ZEN5)[0] for link in (NARROW, POINT))
    tiling = ChainTiling(blocks, 32, 1)
    levels = (ZEN5.levels[0], dataclasses.replace(ZEN5.levels[1], size_bytes=HELD), ZEN5.dram)
    cost = predict_chain(Chain((NARROW, POINT)), tiling, dataclasses.replace(ZEN5, levels=levels), 2, (0, 0))
    own_rows = 32 + 2  # the window of 32 rows; at the image's border one of them is padding, which is not told apart
    expected = 2 * 4 * (own_rows * 64 * 24 + 32 * 64 * 96)
    assert cost.bytes_per_level[-1][1] == pytest.approx(expected)


def test_a_scratch_row_that_does_not_fit_is_written_and_read_again_for_each_row() -> None:
    """Pointwise, pointwise, through a cache smaller than one row of the value between: it passes twice."""
    row = 4 * 64 * 96
    everything = 4 * 64 * 64 * (24 + 24)
    assert moved(POINT, BACK, 64, 1, row // 2) >= everything + 2 * 64 * row * 0.9
    assert moved(POINT, BACK, 64, 1, HELD) == pytest.approx(everything)


def test_a_scale_in_front_reads_only_its_operands() -> None:
    scale = Map((1, 64, 64, 96))
    assert moved(scale, BACK, 64, 1, HELD) == pytest.approx(4 * 64 * 64 * 24)
