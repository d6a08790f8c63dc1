"""What the blocks of a GPU kernel load and store: closed forms by hand, and a count position by position."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sepc.cost_model.gpu_traffic import AxisWalk, Window, walk, walk_axis, weights_of
from sepc.ir.convolution import Convolution

H, W, IN, C, OUT, K = 56, 28, 24, 96, 32, 3
EXPAND = Convolution(2, H, W, H, W, IN, C)
DEPTHWISE = Convolution(2, H, W, H, W, C, C, C, (K, K), (1, 1), (1, 1))
PROJECT = Convolution(2, H, W, H, W, C, OUT)
ROWS, TILES = 14, H // 14
OVERLAP = (TILES - 1) * (K - 1) * W
"""Positions of an image that two tiles of whole rows read, as none is outside of the image twice."""


def weights(*links: Convolution) -> int:
    return sum(map(weights_of, links))


def test_a_pointwise_layer_reads_its_input_once_per_tile_of_output_channels() -> None:
    found = walk((EXPAND,), ROWS, W, 32).elements
    assert (found.compulsory, found.halo, found.reread) == (2 * H * W * IN, 0, 2 * 2 * H * W * IN)
    assert found.weights_reread == (2 * TILES - 1) * weights(EXPAND)
    assert found.results == 2 * H * W * C


def test_a_depthwise_layer_reads_the_halo_of_its_tiles_again() -> None:
    found = walk((DEPTHWISE,), ROWS, W, 32).elements
    assert (found.compulsory, found.halo, found.reread) == (2 * H * W * C, 2 * OVERLAP * C, 0)
    assert found.weights_reread == (2 * TILES - 1) * weights(DEPTHWISE)


def test_depthwise_and_pointwise_recompute_the_first_for_each_tile_of_output_channels() -> None:
    found = walk((DEPTHWISE, PROJECT), ROWS, W, 16).elements
    assert found.compulsory + found.halo == 2 * (H * W + OVERLAP) * C
    assert found.reread == found.compulsory + found.halo
    fetched = 2 * TILES * (2 * weights(DEPTHWISE) + weights(PROJECT))
    assert found.weights + found.weights_reread == fetched


def test_pointwise_and_depthwise_read_the_halo_of_all_input_channels() -> None:
    found = walk((EXPAND, DEPTHWISE), ROWS, W, 32).elements
    assert found.compulsory + found.halo == 2 * (H * W + OVERLAP) * IN
    assert found.reread == 2 * (found.compulsory + found.halo)
    assert found.weights + found.weights_reread == 2 * TILES * weights(EXPAND, DEPTHWISE)


def test_an_inverted_residual_reads_its_input_with_a_halo_and_stores_its_result() -> None:
    walked = walk((EXPAND, DEPTHWISE, PROJECT), ROWS, W, OUT)
    found = walked.elements
    assert found.loads - found.weights - found.weights_reread == 2 * (H * W + OVERLAP) * IN
    assert found.results == 2 * H * W * OUT
    assert walked.computed(0) == 2 * (H * W + OVERLAP) * C
    assert walked.computed(1) == 2 * H * W * C


def test_loops_over_the_grid_touch_what_the_blocks_touch() -> None:
    walked = walk((EXPAND, DEPTHWISE, PROJECT), 5, 9, 16)
    nest, found = walked.nest(), walked.elements
    blocks = nest.footprints[-1]
    assert 4 * (found.compulsory + found.halo + found.reread) == round(blocks.activations * walked.blocks)
    assert 4 * (found.weights + found.weights_reread) == round(blocks.weights * walked.blocks)
    assert 4 * found.results == round(blocks.results * walked.blocks)
    whole = nest.footprints[0]
    assert (whole.activations, whole.weights) == (4 * found.compulsory, 4 * found.weights)


@st.composite
def axes(draw: st.DrawFn) -> tuple[Window, ...]:
    """One to three links along one axis, each reading what the one before it writes."""
    extent = draw(st.integers(1, 20))
    chain: list[Window] = []
    for index in range(draw(st.integers(1, 3))):
        kernel = draw(st.sampled_from((1, 2, 3, 5)))
        stride = 1 if index and kernel == 1 else draw(st.integers(1, 3))
        dilation = draw(st.integers(1, 2))
        padding = draw(st.integers(0, kernel - 1))
        outputs = (extent + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1
        if outputs < 1:
            break
        chain.append(Window(outputs, extent, kernel, stride, padding, dilation))
        extent = outputs
    return tuple(chain) or (Window(extent, extent, 1, 1, 0, 1),)


def position_by_position(chain: tuple[Window, ...], size: int) -> AxisWalk:
    """The same by sets of positions, of which a link computes all between the first and the last."""
    last, read, everything, computed = chain[-1], 0, set[int](), [0] * len(chain)
    tiles = range(0, last.outputs, size)
    for begin in tiles:
        wanted = set(range(begin, begin + size))
        for index in reversed(range(len(chain))):
            link = chain[index]
            computed[index] += len(wanted & set(range(link.outputs)))
            taps = {
                position * link.stride - link.padding + tap * link.dilation
                for position in wanted
                for tap in range(link.kernel)
                # A first window of one tap is only there for results.
                if index or link.kernel > 1 or 0 <= position < link.outputs
            }
            wanted = set(range(min(taps), max(taps) + 1)) if taps and index else taps
        inside = {position for position in wanted if 0 <= position < chain[0].inputs}
        read += len(inside)
        everything |= inside
    return AxisWalk(len(tiles), read, len(everything), tuple(computed))


@given(axes(), st.integers(1, 9))
def test_an_axis_is_walked_as_position_by_position(chain: tuple[Window, ...], size: int) -> None:
    assert walk_axis(chain, size, staged=False) == position_by_position(chain, size)
