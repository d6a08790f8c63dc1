"""GPU: bytes of neighbouring layers unfused and fused, as planned for another machine's figures.

A depthwise and a pointwise convolution in either order, tiled by output rows, columns and output channels. What one
thread block holds (its input tile, the intermediate tile and its weights) has to fit shared memory, a pointwise layer's
accumulators half of the registers, and there must be work for every multiprocessor. Elements from and to DRAM, with n
spatial tiles and f tiles of output channels:

    pointwise            f·I + O + W·n
    depthwise            I + halo + O + W·n
    depthwise+pointwise  f·(I + halo) + O + (W₁ + W₂)·n     (each tile of output channels computes the depthwise anew)
    pointwise+depthwise  f·(I + halo) + O + (W₁ + W₂)·n     (with the halo of the pointwise's input)

`halo` are the input elements that several tiles read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from benchmarks import models
from benchmarks.cost_model.regions import FLOAT_BYTES, captured, run_passes
from benchmarks.cost_model.results import Report
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.passes.sequences import find_sequences
from sepc.target import Target

MACHINE: Final = "sm_75"
MODELS: Final = ("mobilenetv1_100", "mobilenetv2_100", "xception41")
PUBLISHED_SAVING: Final = 0.83
WARP: Final = 32

Layers = tuple[Convolution, ...]  # one or two, each reading what the one before it writes


@dataclass(frozen=True)
class Pair:
    """Two neighbouring layers: planned DRAM bytes."""

    model: str
    stages: str
    unfused_bytes: float
    fused_bytes: float

    @property
    def saving(self) -> float:
        """The part of the unfused bytes that fusing saves."""
        return 1 - self.fused_bytes / self.unfused_bytes


def tile_sizes(extent: int) -> list[int]:
    """Sizes that cut `extent` into even parts."""
    return sorted({ceil_div(extent, parts) for parts in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 56, 112)})


def _reads(conv: Convolution, rows: int, columns: int) -> tuple[int, int]:
    """Input rows and columns that `rows` × `columns` outputs read, at most."""
    height = (rows - 1) * conv.stride[0] + (conv.kernel[0] - 1) * conv.dilation[0] + 1
    width = (columns - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1
    return min(height, conv.in_height), min(width, conv.in_width)


def _weights(conv: Convolution) -> int:
    return conv.out_channels * (conv.group_in * conv.taps + 1)


def planned_bytes(layers: Layers, machine: GpuMachine) -> float:
    """DRAM bytes of one or two convolutions as one kernel, under the best tiling that fits; infinite if there is none.

    Channels of a depthwise convolution are tiled with those of its neighbour; input channels of a pointwise one are
    reduced a warp's width at a time, so its input tile need not be held whole unless it is computed in the kernel.
    """
    last, first = layers[-1], layers[0]
    budget = machine.shared_kib_per_block * 1024 // FLOAT_BYTES
    best = float("inf")
    for rows in tile_sizes(last.out_height):
        for columns in tile_sizes(last.out_width):
            tiles = last.batch * ceil_div(last.out_height, rows) * ceil_div(last.out_width, columns)
            in_rows, in_columns = _through(layers, rows, columns)
            read_per_channel = tiles * in_rows * in_columns
            for channels in _channel_tiles(last):
                parts = ceil_div(last.out_channels, channels)
                if _held(layers, rows, columns, channels) > budget or tiles * parts < machine.multiprocessors:
                    continue
                if last.groups == 1 and rows * columns * channels > machine.registers // 2:
                    continue
                reads = read_per_channel * first.in_channels * (parts if _rereads(layers) else 1)
                weights = tiles * sum(map(_weights, layers))
                if len(layers) == 2 and _rereads(layers) and layers[0].groups > 1:
                    weights += tiles * (parts - 1) * _weights(layers[0])
                written = last.pixels * last.out_channels
                best = min(best, FLOAT_BYTES * (reads + weights + written))
    return best


def _through(layers: Layers, rows: int, columns: int) -> tuple[int, int]:
    for link in reversed(layers):
        rows, columns = _reads(link, rows, columns)
    return rows, columns


def _rereads(layers: Layers) -> bool:
    """Whether each tile of output channels reads all input channels."""
    return any(link.groups == 1 for link in layers)


def _channel_tiles(conv: Convolution) -> list[int]:
    return sorted({min(conv.out_channels, WARP * count) for count in (1, 2, 4, 8, 16, 32)})


def _held(layers: Layers, rows: int, columns: int, channels: int) -> int:
    """Elements of shared memory that one thread block needs."""
    last = layers[-1]
    in_rows, in_columns = _reads(last, rows, columns)
    if len(layers) == 1:
        slice_channels = WARP if last.groups == 1 else channels
        return in_rows * in_columns * slice_channels + channels * (slice_channels if last.groups == 1 else last.taps)
    first = layers[0]
    # A pointwise consumer needs all channels of the intermediate tile, a depthwise one only its own.
    between = in_rows * in_columns * (last.in_channels if last.groups == 1 else channels)
    outer = _reads(first, in_rows, in_columns)
    slice_of_input = outer[0] * outer[1] * WARP
    weights = WARP * channels + (last.taps if last.groups > 1 else first.taps) * channels
    return between + slice_of_input + weights


def pairs_of(model: str, machine: GpuMachine) -> Iterator[Pair]:
    """Neighbouring depthwise and pointwise layers of a model, each distinct pair once."""
    module, inputs = models.load(model)
    graph_module = captured(module, inputs)
    run_passes(graph_module, Target.parse("x86-64-v3"), 1, "canonicalize", "group")
    seen: set[Layers] = set()
    for sequence in find_sequences(graph_module):
        convolutions = [link.stage if isinstance(link.stage, Convolution) else None for link in sequence.links]
        for first, last in pairwise(convolutions):
            if first is None or last is None or not _is_separable(first, last) or (first, last) in seen:
                continue
            seen.add((first, last))
            alone = planned_bytes((first,), machine) + planned_bytes((last,), machine)
            yield Pair(model, _describe((first, last)), alone, planned_bytes((first, last), machine))


def _is_separable(first: Convolution, last: Convolution) -> bool:
    """Whether one of the two is depthwise and the other pointwise."""
    depthwise, pointwise = (first, last) if first.groups > 1 else (last, first)
    return depthwise.group_in == depthwise.group_out == 1 < depthwise.groups and pointwise.taps == pointwise.groups == 1


def _describe(layers: Layers) -> str:
    names = [
        f"{'dw' if link.groups > 1 else 'pw'} {link.in_channels}→{link.out_channels} @{link.out_height}"
        for link in layers
    ]
    return ", ".join(names)


def run(*, quick: bool = False) -> Report:
    """Plan the pairs of three models for `MACHINE`."""
    machine = GpuMachine.load(MACHINE)
    return report_of([pair for model in MODELS[: 1 if quick else None] for pair in pairs_of(model, machine)])


def report_of(pairs: list[Pair]) -> Report:
    """The table and the largest saving."""
    report = Report(
        "gpu",
        f"Planned DRAM traffic of layer pairs on {MACHINE}",
        ["model", "layers", "unfused KiB", "fused KiB", "saving %"],
    )
    for pair in pairs:
        cells = [pair.unfused_bytes / 1024, pair.fused_bytes / 1024]
        feasible = pair.fused_bytes != float("inf")
        report.rows.append(
            [pair.model, pair.stages, cells[0], *([cells[1], 100 * pair.saving] if feasible else ["does not fit", "–"])]
        )
    best = max(pairs, key=lambda pair: pair.saving)
    report.summary.append(
        f"GPU: the largest saving over {len(pairs)} pairs planned for {MACHINE} is {best.saving:.0%} ({best.model}, "
        f"{best.stages}); FusePlanner reports {PUBLISHED_SAVING:.0%} at most"
    )
    return report
