"""ATen's upsampling operators: each output along a dimension is a fixed weighted sum of a few inputs (taps)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sepc.backends.generic_ops.emitter import Converter, Emitter, Expr, Tensor, shape_of


@dataclass(frozen=True)
class _Tap:
    """One source of each output position along a dimension: `index[o]` with `weight[o]` (1 where it is None)."""

    index: np.ndarray
    weight: np.ndarray | None = None


def _scale(size: int, out: int, corners: bool, factor: float | None) -> np.float32:
    if corners:
        return np.float32((size - 1) / (out - 1) if out > 1 else 0)
    return np.float32(1 / factor if factor else size / out)


def _nearest_taps(size: int, out: int, factor: float | None, centre: float) -> list[_Tap]:
    position = (np.arange(out, dtype=np.float32) + np.float32(centre)) * _scale(size, out, False, factor)
    return [_Tap(np.minimum(np.floor(position), size - 1).astype(np.int32))]


def _positions(size: int, out: int, corners: bool, factor: float | None) -> Any:
    scale, ramp = _scale(size, out, corners, factor), np.arange(out, dtype=np.float32)
    return ramp * scale if corners else (ramp + np.float32(0.5)) * scale - np.float32(0.5)


def _linear_taps(size: int, out: int, corners: bool, factor: float | None) -> list[_Tap]:
    position = np.maximum(_positions(size, out, corners, factor), 0)
    low = np.minimum(np.floor(position).astype(np.int32), size - 1)
    fraction = np.clip(position - low, 0, 1).astype(np.float32)
    return [_Tap(low, 1 - fraction), _Tap(np.minimum(low + 1, size - 1), fraction)]


def _cubic_taps(size: int, out: int, corners: bool, factor: float | None) -> list[_Tap]:
    position = _positions(size, out, corners, factor)
    base = np.floor(position).astype(np.int32)
    fraction = (position - base).astype(np.float32)
    a = np.float32(-0.75)  # the cubic kernel's parameter in PyTorch

    def near(x: Any) -> Any:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Any) -> Any:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = [far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)]
    return [_Tap(np.clip(base + k - 1, 0, size - 1), weight.astype(np.float32)) for k, weight in enumerate(weights)]


def _resample(
    emitter: Emitter, x: Tensor, make_taps: Callable[[int, int, float | None], list[_Tap]], factors: Any
) -> Tensor:
    """`x` [N, C, spatial…] resampled along one dimension after the other, the innermost, with its gathers, last."""
    sizes, outs = shape_of(x)[2:], emitter.shape[2:]
    for number_of, (size, out) in enumerate(zip(sizes, outs, strict=True)):
        taps = make_taps(size, out, factors[number_of] if factors else None)
        x = _resample_one(emitter, x, number_of + 2, out, taps)
    return x


def _resample_one(emitter: Emitter, x: Tensor, dim: int, out: int, taps: Sequence[_Tap]) -> Tensor:
    tables = [
        (emitter.constant(tap.index), None if tap.weight is None else emitter.constant(tap.weight)) for tap in taps
    ]

    def element(*indices: Expr) -> Expr:
        total = None
        for index, weight in tables:
            value = x(*indices[:dim], index(indices[dim]), *indices[dim + 1 :])
            value = value if weight is None else value * weight(indices[dim])
            total = value if total is None else total + value
        return total

    shape = shape_of(x)
    sources = [x] * len(tables) + [table for pair in tables for table in pair if table is not None]
    return emitter.compute((*shape[:dim], out, *shape[dim + 1 :]), element, sources)


def _upsample_nearest(centre: float) -> Converter:
    def convert(emitter: Emitter, x: Tensor, _: Any, factors: Sequence[float] | None) -> Tensor:
        return _resample(emitter, x, lambda size, out, factor: _nearest_taps(size, out, factor, centre), factors)

    return convert


def _upsample_smooth(make_taps: Callable[[int, int, bool, float | None], list[_Tap]]) -> Converter:
    def convert(emitter: Emitter, x: Tensor, _: Any, corners: bool, factors: Sequence[float] | None) -> Tensor:
        return _resample(emitter, x, lambda size, out, factor: make_taps(size, out, corners, factor), factors)

    return convert


RESAMPLING: dict[str, Converter] = {
    "upsample_nearest1d.vec": _upsample_nearest(0.0),
    "upsample_nearest2d.vec": _upsample_nearest(0.0),
    "_upsample_nearest_exact2d.vec": _upsample_nearest(0.5),
    "upsample_linear1d.vec": _upsample_smooth(_linear_taps),
    "upsample_bilinear2d.vec": _upsample_smooth(_linear_taps),
    "upsample_bicubic2d.vec": _upsample_smooth(_cubic_taps),
}
