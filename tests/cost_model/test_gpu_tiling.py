"""Tilings for GPUs: what a block has of each value."""

from __future__ import annotations

from sepc.cost_model.gpu_tiling import GpuLink, GpuTiling, Tile, link_tiles, read_extent, shared_bytes
from sepc.ir.convolution import Convolution

EXPAND = Convolution(1, 56, 56, 56, 56, 24, 144)
DEPTHWISE = Convolution(1, 56, 56, 28, 28, 144, 144, 144, (3, 3), (2, 2), (1, 1))
PROJECT = Convolution(1, 28, 28, 28, 28, 144, 32)


def test_a_block_has_the_halo_that_the_next_link_reads() -> None:
    tiles = link_tiles((EXPAND, DEPTHWISE, PROJECT), 4, 7, 32, chunk=16)
    assert tiles == (Tile(9, 15, 16), Tile(4, 7, 16), Tile(4, 7, 32))


def test_a_turn_of_a_depthwise_last_link_has_all_channels_of_the_block() -> None:
    assert link_tiles((EXPAND, DEPTHWISE), 4, 7, 48, chunk=0) == (Tile(9, 15, 48), Tile(4, 7, 48))


def test_shared_memory_holds_the_values_between_links_with_a_vector_more_per_position() -> None:
    assert shared_bytes((EXPAND, DEPTHWISE, PROJECT), 4, 7, 32, 16) == 4 * 20 * (9 * 15 + 4 * 7)
    assert shared_bytes((EXPAND, DEPTHWISE), 4, 7, 48, 0) == 4 * 52 * 9 * 15


def test_shared_memory_holds_the_input_of_a_dense_layer_and_nothing_of_a_depthwise_one() -> None:
    assert shared_bytes((PROJECT,), 4, 7, 32, 16) == 4 * 20 * 4 * 7
    assert shared_bytes((DEPTHWISE,), 4, 7, 32, 0) == 0


def test_positions_in_shared_memory_start_at_whole_vectors() -> None:
    stem = Convolution(1, 9, 9, 9, 9, 3, 8, kernel=(3, 3), padding=(1, 1))
    assert shared_bytes((stem,), 1, 1, 8, 3) == 4 * 8 * 9


def test_a_kernel_of_one_tap_reads_a_position_per_output_whatever_its_stride() -> None:
    assert read_extent(5, kernel=1, stride=2, dilation=1) == 5
    assert read_extent(5, kernel=3, stride=2, dilation=1) == 11
    assert read_extent(1, kernel=3, stride=1, dilation=4) == 9


def test_a_link_with_too_few_channels_has_a_part_of_a_group() -> None:
    assert Tile(2, 9, 24).items(GpuLink(4, 2)) == 2 * 3 * 3
    assert Tile(2, 8, 3).items(GpuLink(4, 1)) == 4


def test_a_tiling_says_what_a_block_computes() -> None:
    links = (GpuLink(2, 1), GpuLink(1, 1), GpuLink(7, 2))
    tiling = GpuTiling(4, 7, 32, 64, links, 16, shared_bytes=10432, registers=80)
    assert str(tiling) == (
        "block 4×7 pixels × 32 channels in turns of 16 input channels, 64 threads of registers 2×1 vectors, "
        "1×1 vectors, 7×2 vectors, 10.2 KiB shared"
    )
