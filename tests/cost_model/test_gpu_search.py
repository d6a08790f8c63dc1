"""Tilings for GPUs: what a GPU cannot hold is never chosen, and predictions move the right way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepc.cost_model.gpu_blocks import registers_of
from sepc.cost_model.gpu_latency import GpuProblem, predict_gpu
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_search import choose_gpu, gpu_tilings, is_gpu_chain
from sepc.cost_model.gpu_tiling import GpuLink, GpuTiling, is_dense, link_tiles, shared_bytes
from sepc.cost_model.gpu_traffic import Links
from sepc.ir.convolution import Convolution
from sepc.ir.depth import Depth

MACHINES = tuple(map(GpuMachine.load, GpuMachine.known()))
A100, T4 = GpuMachine.load("sm_80"), GpuMachine.load("sm_75")


def pointwise(size: int, inputs: int, outputs: int) -> Convolution:
    return Convolution(1, size, size, size, size, inputs, outputs)


def depthwise(size: int, channels: int, kernel: int = 3, stride: int = 1) -> Convolution:
    out = -(-size // stride)
    options = ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
    return Convolution(1, size, size, out, out, channels, channels, channels, *options)


def residual(size: int, channels: int, expansion: int, stride: int = 1) -> Links:
    """An inverted residual."""
    inner, out = channels * expansion, -(-size // stride)
    return pointwise(size, channels, inner), depthwise(size, inner, stride=stride), pointwise(out, inner, channels)


@st.composite
def chains(draw: st.DrawFn) -> Links:
    """A chain of every kind, or a part of one, of random sizes."""
    size, channels = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    links = residual(size, channels, draw(st.integers(1, 6)), draw(st.integers(1, 2)))
    begin = draw(st.integers(0, 2))
    found = links[begin : draw(st.integers(begin + 1, 3))]
    return found if is_gpu_chain(found) else links[:1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(chains(), st.sampled_from(MACHINES))
def test_no_tiling_takes_more_than_there_is(links: Links, machine: GpuMachine) -> None:
    none = (0,) * len(links)
    for tiling in gpu_tilings(GpuProblem(links, machine, none, none)):
        shape = (tiling.rows, tiling.columns, tiling.channels, tiling.chunk)
        assert tiling.shared_bytes == shared_bytes(links, *shape) <= machine.shared_kib_per_block * 1024
        assert tiling.registers == registers_of(links, tiling.links) <= machine.registers_per_thread
        assert tiling.registers * tiling.threads <= machine.registers
        assert tiling.threads <= machine.threads_per_block
        assert tiling.threads % machine.warp_size == 0
        assert machine.resident_blocks(tiling.threads, tiling.registers, tiling.shared_bytes) > 0
        if is_dense(links[-1]):
            assert link_tiles(links, *shape)[-1].items(tiling.links[-1]) <= tiling.threads
            assert tiling.chunk % 4 == 0 or tiling.chunk == links[-1].in_channels
        else:
            assert tiling.chunk == 0
        assert tiling.channels % 4 == 0 or tiling.channels == links[-1].out_channels


@settings(max_examples=10, deadline=None, derandomize=True)
@given(chains(), st.sampled_from(MACHINES))
def test_the_choice_is_one_of_the_considered_and_predicted_as_such(links: Links, machine: GpuMachine) -> None:
    none = (0,) * len(links)
    found, considered = choose_gpu(links, machine, none, none), set(gpu_tilings(GpuProblem(links, machine, none, none)))
    if found is None:  # Chains of few channels and pixels may have none.
        assert not considered
        assert len(links) > 1
        return
    assert isinstance(found.tiling, GpuTiling)
    assert found.tiling in considered
    assert found.cost == predict_gpu(links, found.tiling, machine, none, none)
    assert found.cost.time_us > machine.launch_us
    assert found.cost.flops == sum(link.flops for link in links)


def time_us(links: Links, machine: GpuMachine, cost: int = 0, operand_bytes: int = 0) -> float:
    """Predicted time under the tiling that the T4 would get, so that only the prediction differs."""
    none = (0,) * len(links)
    tiling = choose_gpu(links, T4, none, none)
    assert tiling is not None
    assert isinstance(tiling.tiling, GpuTiling)
    costs, operands = (cost,) * len(links), (*none[1:], operand_bytes)
    return predict_gpu(links, tiling.tiling, machine, costs, operands).time_us


LINKS = (
    (pointwise(56, 24, 144),),
    (depthwise(56, 144),),
    (depthwise(56, 144), pointwise(56, 144, 24)),
    (pointwise(56, 24, 144), depthwise(56, 144)),
    residual(56, 24, 6),
)


@pytest.mark.parametrize("links", LINKS)
@pytest.mark.parametrize("figure", ["clock_ghz", "dram_gb_per_s", "l2_bytes_per_cycle", "l2_kib", "multiprocessors"])
def test_a_better_gpu_takes_no_longer(links: Links, figure: str) -> None:
    better = replace(T4, **{figure: 2 * getattr(T4, figure)})
    assert time_us(links, better) <= time_us(links, T4)


@pytest.mark.parametrize("links", LINKS)
def test_more_work_takes_no_less_time(links: Links) -> None:
    assert time_us(links, T4, cost=20) >= time_us(links, T4)
    assert time_us(links, T4, operand_bytes=1 << 24) > time_us(links, T4)
    larger = tuple(replace(link, batch=8) for link in links)
    none = (0,) * len(links)
    one, eight = (choose_gpu(which, T4, none, none) for which in (links, larger))
    assert one is not None
    assert eight is not None
    assert one.cost.time_us < eight.cost.time_us


def test_a_block_too_many_takes_another_wave() -> None:
    links, none = (depthwise(56, 32),), (0,)
    tiling = GpuTiling(56, 56, 4, 1024, (GpuLink(1, 1),), 0, 0, 64)
    together = T4.multiprocessors  # Each holds one: 65536 registers / (1024 · 64).
    times = {}
    for blocks in (together, together + 1, 2 * together):
        wide = (replace(links[0], in_channels=4 * blocks, out_channels=4 * blocks, groups=4 * blocks),)
        unlimited = replace(T4, l2_kib=1 << 20, dram_gb_per_s=1e6, l2_bytes_per_cycle=1e6)
        times[blocks] = predict_gpu(wide, tiling, unlimited, none, none).time_us - T4.launch_us
    assert times[together + 1] == pytest.approx(2 * times[together], rel=0.01)
    assert times[2 * together] == pytest.approx(2 * times[together], rel=0.01)


def test_what_does_not_fit_shared_memory_has_no_tiling() -> None:
    links, none = residual(56, 24, 6), (0, 0, 0)
    assert choose_gpu(links, replace(A100, shared_kib_per_block=1), none, none) is None


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        (residual(56, 24, 6), True),
        ((pointwise(56, 24, 24), pointwise(56, 24, 8)), True),
        ((depthwise(56, 24), depthwise(56, 24), pointwise(56, 24, 8)), True),
        ((depthwise(56, 24), pointwise(56, 24, 24), depthwise(56, 24)), False),  # dense in the middle
        ((depthwise(56, 24), replace(pointwise(28, 24, 24), in_height=56, in_width=56, stride=(2, 2))), False),
        ((replace(pointwise(56, 24, 24), groups=2),), False),
        ((replace(depthwise(56, 24), out_channels=48),), False),  # a multiplier
        ((replace(pointwise(56, 24, 24), depth=Depth(4, 4)),), False),
    ],
)
def test_which_chains_one_kernel_computes(links: Links, expected: bool) -> None:
    assert is_gpu_chain(links) == expected
