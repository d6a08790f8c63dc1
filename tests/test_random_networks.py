"""Random small networks against eager: convolutions of any kind and rank, with branches, sums and concatenations.

Several networks are compiled as one model, with an input and results of its own each: most of what a compilation costs
is the same for one network and for many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import sepc
from tests.helpers import NORMALIZATIONS, TOLERANCE, with_statistics

NETWORKS = 500
PER_MODEL = 10
CONVOLUTIONS_PER_NETWORK = (2, 2, 3, 3, 4, 5, 6, 8)  # mostly few, as each takes time to compile
KINDS = ("pointwise", "dense", "grouped", "depthwise", "transposed")
ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.Identity, nn.ReLU, nn.SiLU, nn.Hardswish, nn.GELU)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MOST_PIXELS = {1: 64, 2: 400, 3: 1000}


@dataclass(frozen=True)
class Step:
    """A value of a network: a layer of one value before it, or the sum or concatenation of several."""

    kind: str
    sources: tuple[int, ...]
    layer: nn.Module


class Network(nn.Module):
    """The values of `steps`, the input being number 0; returns those that no step reads."""

    def __init__(self, steps: Sequence[Step], shape: tuple[int, ...], channels_last: bool) -> None:
        super().__init__()
        self.steps, self.shape, self.channels_last = steps, shape, channels_last
        self.layers = nn.ModuleList(step.layer for step in steps)
        read = {source for step in steps for source in step.sources}
        self.results = [index for index in range(1, len(steps) + 1) if index not in read]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values = [x]
        for step in self.steps:
            given_values = [values[source] for source in step.sources]
            combined = given_values[0] if len(given_values) == 1 else self._combined(step.kind, given_values)
            values.append(step.layer(combined))
        return [values[index] for index in self.results]

    @staticmethod
    def _combined(kind: str, values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(values, 1) if kind == "concatenation" else values[0] + values[1]

    def example(self) -> torch.Tensor:
        value = torch.randn(self.shape)
        if not self.channels_last:
            return value
        return value.movedim(1, -1).contiguous().movedim(-1, 1)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """2 to 8 convolutions, each of some value before it; between them sums and concatenations of values that fit."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    sizes = tuple(draw(st.integers(1, {1: 40, 2: 14, 3: 6}[rank])) for _ in range(rank))
    shapes = [(draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 20)), *sizes)]
    steps: list[Step] = []
    for _ in range(draw(st.sampled_from(CONVOLUTIONS_PER_NETWORK))):
        source = draw(st.integers(max(0, len(shapes) - 3), len(shapes) - 1))
        layer, shape = draw(convolutions(shapes[source]))
        steps.append(Step("convolution", (source,), layer))
        shapes.append(shape)
        if (joined := draw(joins(shapes))) is not None:
            step, shape = joined
            steps.append(step)
            shapes.append(shape)
    return Network(steps, shapes[0], draw(st.booleans()))


@st.composite
def joins(draw: st.DrawFn, shapes: Sequence[tuple[int, ...]]) -> tuple[Step, tuple[int, ...]] | None:
    """A sum or concatenation of the last value with one before it, if one fits and chance wants it."""
    last, kind = shapes[-1], draw(st.sampled_from(["sum", "concatenation", "none"]))
    pixels = [index for index, shape in enumerate(shapes[:-1]) if (shape[0], *shape[2:]) == (last[0], *last[2:])]
    others = pixels if kind == "concatenation" else [index for index in pixels if shapes[index] == last]
    if kind == "none" or not others:
        return None
    other = draw(st.sampled_from(others))
    channels = last[1] + shapes[other][1] if kind == "concatenation" else last[1]
    layer = draw(st.sampled_from(ACTIVATIONS))()
    return Step(kind, (other, len(shapes) - 1), layer), (last[0], channels, *last[2:])


@st.composite
def convolutions(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution of a tensor of `shape`, perhaps with normalisation and activation, and the shape of its result."""
    batch, channels, *sizes = shape
    rank = len(sizes)
    kind = draw(st.sampled_from(KINDS))
    # One that would make the map too large gets no larger.
    transposed = kind == "transposed" and math.prod(sizes) * 3**rank <= MOST_PIXELS[rank]
    divisors = [one for one in range(1, channels + 1) if channels % one == 0]
    many = {
        "depthwise": channels,
        "grouped": draw(st.sampled_from(divisors)),
        "transposed": draw(st.sampled_from(divisors)),
    }
    groups = many.get(kind, 1)
    out_channels = groups * draw(st.integers(1, max(1, 24 // groups)))
    strides = (1, 1, 2, 3) if transposed and rank < 3 else (1, 1, 1, 2)
    options = [draw(axes(size, kind == "pointwise", transposed, strides)) for size in sizes]
    kernel, stride, dilation, padding, extra, out = (tuple(one) for one in zip(*options, strict=True))
    bias = draw(st.booleans())
    convolution: nn.Module
    if transposed:
        make = TRANSPOSED[rank - 1]
        convolution = make(channels, out_channels, kernel, stride, padding, extra, groups, bias, dilation)
    else:
        convolution = CONVOLUTIONS[rank - 1](channels, out_channels, kernel, stride, padding, dilation, groups, bias)
    layers = [convolution]
    if draw(st.integers(0, 2)) == 0:
        layers.append(NORMALIZATIONS[rank - 1](out_channels))
    layers.append(draw(st.sampled_from(ACTIVATIONS))())
    return nn.Sequential(*layers), (batch, out_channels, *out)


@st.composite
def axes(
    draw: st.DrawFn, size: int, pointwise: bool, transposed: bool, strides: Sequence[int]
) -> tuple[int, int, int, int, int, int]:
    """Kernel, stride, dilation, padding, output padding and size of the result along a dimension of `size`."""
    stride = draw(st.sampled_from(strides))
    if pointwise and not transposed:
        return 1, stride, 1, 0, 0, (size - 1) // stride + 1
    kernel, dilation = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2, 3]))
    reach = (kernel - 1) * dilation
    if transposed:
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        whole = (size - 1) * stride + reach + extra + 1
        padding = min(draw(st.integers(0, 3)), (whole - 1) // 2)
        return kernel, stride, dilation, padding, extra, whole - 2 * padding
    padding = max(draw(st.integers(0, reach)), math.ceil((reach + 1 - size) / 2))
    return kernel, stride, dilation, padding, 0, (size + 2 * padding - reach - 1) // stride + 1


class Parallel(nn.Module):
    """Several networks, each with an input of its own."""

    def __init__(self, parts: Sequence[Network]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        return [part(value) for part, value in zip(self.parts, inputs, strict=True)]


@pytest.mark.slow
@settings(
    max_examples=NETWORKS // PER_MODEL,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(parts=st.lists(networks(), min_size=PER_MODEL, max_size=PER_MODEL))
def test_random_networks_agree_with_eager_in_stages_of_ours(parts: list[Network]) -> None:
    torch.manual_seed(0)
    model, inputs = with_statistics(Parallel(parts)), [part.example() for part in parts]
    with torch.no_grad():
        expected = model(inputs)
    compiled = sepc.compile(model, num_threads=2)
    for part, results, references in zip(parts, compiled(inputs), expected, strict=True):
        for result, reference in zip(results, references, strict=True):
            assert result.shape == reference.shape
            error = (result - reference).abs().max()
            assert error <= TOLERANCE * reference.abs().max(), f"{part} of {part.shape}: off by {error:.2g}"
    others = [(one.ops, one.reason) for one in compiled.regions if one.kernel != "sepc"]
    assert not others
