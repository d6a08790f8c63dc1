"""ATen reductions, and the normalisations and softmaxes made of them. Variances take two passes, as PyTorch's do."""

from __future__ import annotations

import math as python_math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from sepc.backends.generic_ops.emitter import (
    Converter,
    Emitter,
    Expr,
    Tensor,
    UnsupportedError,
    broadcast_read,
    cast,
    dtype_of,
    like,
    number,
    shape_of,
)

# cumsum is computed as a masked sum over the whole dimension: quadratic, which pays only while the dimension is short.
_MAX_CUMSUM_EXTENT = 1024

Dimensions = Sequence[int] | int | None


def _dimensions(x: Tensor, dims: Dimensions) -> list[int]:
    rank = len(x.shape)
    chosen = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return sorted(dim % rank for dim in chosen) if rank else []


def _reduce(
    emitter: Emitter,
    x: Tensor,
    dims: Sequence[int],
    reducer: Callable[..., Expr],
    element: Callable[[Expr], Expr],
    keep: bool,
) -> Tensor:
    """`reducer` over dimensions `dims` of `element(x)`; the dimensions stay as ones where `keep` is set."""
    shape = shape_of(x)
    axes = {dim: te.reduce_axis((0, shape[dim]), name=f"reduce_{dim}") for dim in dims}
    kept = [dim for dim in range(len(shape)) if dim not in axes]

    def at(*indices: Expr) -> Expr:
        own = dict(zip(kept, [indices[dim] for dim in kept] if keep else indices, strict=True))
        read = x(*[axes[dim] if dim in axes else own[dim] for dim in range(len(shape))])
        return reducer(element(read), axis=list(axes.values())) if axes else element(read)

    result = [1 if dim in axes else extent for dim, extent in enumerate(shape) if keep or dim not in axes]
    return emitter.compute(result, at, [x], stored=bool(axes))


def _sum(emitter: Emitter, x: Tensor, dims: Dimensions, keep: bool, dtype: str) -> Tensor:
    return _reduce(emitter, x, _dimensions(x, dims), te.sum, lambda value: cast(value, dtype), keep)


def _extreme(emitter: Emitter, x: Tensor, dims: Dimensions, keep: bool, largest: bool) -> Tensor:
    """Maximum or minimum. The reducers start from a finite number, so an extreme of infinities only is restored."""
    result = _reduce(emitter, x, _dimensions(x, dims), te.max if largest else te.min, lambda value: value, keep)
    if dtype_of(x) != "float32":
        return result
    limit = tirx.min_value("float32") if largest else tirx.max_value("float32")
    infinity = number(-python_math.inf if largest else python_math.inf, "float32")
    return emitter.compute(
        shape_of(result), lambda *i: tirx.Select(tirx.EQ(result(*i), limit), infinity, result(*i)), [result]
    )


def _scaled(emitter: Emitter, x: Tensor, factor: float) -> Tensor:
    return emitter.compute(shape_of(x), lambda *i: x(*i) * number(factor, "float32"), [x])


def _extent(x: Tensor, dims: Dimensions) -> int:
    return python_math.prod(shape_of(x)[dim] for dim in _dimensions(x, dims))


def _mean_of(emitter: Emitter, x: Tensor, dims: Dimensions, keep: bool) -> Tensor:
    return _scaled(emitter, _sum(emitter, x, dims, keep, "float32"), 1 / _extent(x, dims))


def _moments(emitter: Emitter, x: Tensor, dims: Dimensions, keep: bool, correction: float) -> tuple[Tensor, Tensor]:
    """Variance and mean of `x` over `dims`, the mean with its reduced dimensions kept."""
    mean = _mean_of(emitter, x, dims, True)
    centred = emitter.compute(shape_of(x), lambda *i: x(*i) - broadcast_read(mean, i), [x, mean])
    total = _reduce(emitter, centred, _dimensions(x, dims), te.sum, lambda value: value * value, keep)
    return _scaled(
        emitter, total, 1 / max(_extent(x, dims) - correction, 0) if _extent(x, dims) > correction else float("nan")
    ), mean


def _sqrt(emitter: Emitter, x: Tensor) -> Tensor:
    return emitter.compute(shape_of(x), lambda *i: tirx.sqrt(x(*i)), [x])


def _sum_entry(emitter: Emitter, x: Tensor, dims: Dimensions = None, keep: bool = False, dtype: Any = None) -> Tensor:
    return _sum(emitter, x, dims, keep, emitter.dtype)


def _sum_all(emitter: Emitter, x: Tensor, dtype: Any = None) -> Tensor:
    return _sum(emitter, x, None, False, emitter.dtype)


def _mean(emitter: Emitter, x: Tensor, dims: Dimensions = None, keep: bool = False, dtype: Any = None) -> Tensor:
    return _mean_of(emitter, x, dims, keep)


def _mean_all(emitter: Emitter, x: Tensor, dtype: Any = None) -> Tensor:
    return _mean_of(emitter, x, None, False)


def _variance(emitter: Emitter, x: Tensor, dims: Dimensions, correction: float | None, keep: bool) -> Tensor:
    return _moments(emitter, x, dims, keep, 1 if correction is None else correction)[0]


def _deviation(emitter: Emitter, x: Tensor, dims: Dimensions, correction: float | None, keep: bool) -> Tensor:
    return _sqrt(emitter, _variance(emitter, x, dims, correction, keep))


def _variance_mean(
    emitter: Emitter, x: Tensor, dims: Dimensions, correction: float | None, keep: bool
) -> tuple[Tensor, Tensor]:
    variance = _variance(emitter, x, dims, correction, keep)
    return variance, _mean_of(emitter, x, dims, keep)


def _arg_extreme(emitter: Emitter, x: Tensor, dim: int, keep: bool, largest: bool) -> tuple[Tensor, Tensor]:
    """Indices (int64) and values of the extremes over `dim`; the first of equal ones wins."""
    shape, dtype = shape_of(x), dtype_of(x)
    dim = dim % len(shape)
    limit = (tirx.min_value if largest else tirx.max_value)(dtype)
    axis = te.reduce_axis((0, shape[dim]), name="reduce")

    def combine(left: Sequence[Expr], right: Sequence[Expr]) -> tuple[Expr, Expr]:
        better = left[1] > right[1] if largest else left[1] < right[1]
        take_left = tirx.Or(better, tirx.And(tirx.EQ(left[1], right[1]), left[0] < right[0]))
        return tirx.Select(take_left, left[0], right[0]), tirx.Select(take_left, left[1], right[1])

    reducer = te.comm_reducer(combine, lambda *types: (number(2**31 - 1, types[0]), limit))

    def element(*indices: Expr) -> Expr:
        own = list(indices)
        own[dim : dim + (1 if keep else 0)] = [axis]
        return reducer((tirx.Cast("int64", axis.var), x(*own)), axis=axis)

    kept = [1] if keep else []
    result = te.compute((*shape[:dim], *kept, *shape[dim + 1 :]), element, name=f"arg_{emitter.unique()}")
    return result[0], result[1]


def _arg(largest: bool) -> Converter:
    def convert(emitter: Emitter, x: Tensor, dim: int | None = None, keep: bool = False) -> Tensor:
        if dim is None or not x.shape:
            raise UnsupportedError("argmax or argmin over all dimensions")
        return _arg_extreme(emitter, x, dim, keep, largest)[0]

    return convert


def _extreme_with_index(largest: bool) -> Converter:
    def convert(emitter: Emitter, x: Tensor, dim: int, keep: bool = False) -> tuple[Tensor, Tensor]:
        indices, values = _arg_extreme(emitter, x, dim, keep, largest)
        return values, indices

    return convert


def _extreme_entry(largest: bool) -> Converter:
    def convert(emitter: Emitter, x: Tensor, dims: Dimensions = None, keep: bool = False) -> Tensor:
        return _extreme(emitter, x, dims, keep, largest)

    return convert


def _softmax_parts(emitter: Emitter, x: Tensor, dims: Dimensions) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum over `dims`, exp(x - maximum), and the latter's sum; reduced dimensions are kept."""
    largest = _extreme(emitter, x, dims, True, True)
    powers = emitter.compute(shape_of(x), lambda *i: emitter.exp(x(*i) - broadcast_read(largest, i)), [x, largest])
    return largest, powers, _sum(emitter, powers, dims, True, "float32")


def _softmax(emitter: Emitter, x: Tensor, dim: int, _: Any = None) -> Tensor:
    _, powers, total = _softmax_parts(emitter, x, dim)
    inverse = emitter.compute(shape_of(total), lambda *i: like(1, total(*i)) / total(*i), [total])
    return emitter.compute(shape_of(x), lambda *i: powers(*i) * broadcast_read(inverse, i), [powers, inverse])


def _log_softmax(emitter: Emitter, x: Tensor, dim: int, _: Any = None) -> Tensor:
    largest, _powers, total = _softmax_parts(emitter, x, dim)
    shift = emitter.compute(
        shape_of(total), lambda *i: largest(*i) + emitter.library(tirx.log, total(*i)), [largest, total]
    )
    return emitter.compute(shape_of(x), lambda *i: x(*i) - broadcast_read(shift, i), [x, shift])


def _logsumexp(emitter: Emitter, x: Tensor, dims: Dimensions, keep: bool = False) -> Tensor:
    largest, _, total = _softmax_parts(emitter, x, dims)
    out, shape = emitter.shape, shape_of(total)
    reduced = _dimensions(x, dims)

    def element(*indices: Expr) -> Expr:
        rest = iter(indices)
        own = (
            list(indices)
            if keep
            else [tirx.const(0, "int32") if dim in reduced else next(rest) for dim in range(len(shape))]
        )
        return largest(*own) + emitter.library(tirx.log, total(*own))

    return emitter.compute(out, element, [largest, total])


def _vector_norm(
    emitter: Emitter, x: Tensor, order: float = 2, dims: Dimensions = None, keep: bool = False, _: Any = None
) -> Tensor:
    if order not in (1, 2):
        raise UnsupportedError(f"vector norm of order {order}")
    if order == 1:
        return _reduce(emitter, x, _dimensions(x, dims), te.sum, tirx.abs, keep)
    return _sqrt(emitter, _reduce(emitter, x, _dimensions(x, dims), te.sum, lambda value: value * value, keep))


def _normalise(
    emitter: Emitter,
    x: Tensor,
    dims: Sequence[int],
    epsilon: float,
    affine: Callable[[Expr, Sequence[Expr]], Expr],
    sources: Sequence[Tensor],
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over `dims`, then `affine(value, indices)`."""
    variance, mean = _moments(emitter, x, dims, True, 0)
    inverse = emitter.compute(
        shape_of(variance),
        lambda *i: like(1, variance(*i)) / tirx.sqrt(variance(*i) + number(epsilon, "float32")),
        [variance],
    )
    return emitter.compute(
        shape_of(x),
        lambda *i: affine((x(*i) - broadcast_read(mean, i)) * broadcast_read(inverse, i), i),
        [x, mean, inverse, *sources],
    )


def _affine(
    weight: Tensor | None, bias: Tensor | None, index: Callable[[Sequence[Expr]], Sequence[Expr]]
) -> Callable[..., Expr]:
    def apply(value: Expr, indices: Sequence[Expr]) -> Expr:
        value = value if weight is None else value * weight(*index(indices))
        return value if bias is None else value + bias(*index(indices))

    return apply


def _layer_norm(
    emitter: Emitter,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    _: bool = True,
) -> Tensor:
    rank = len(shape)
    affine = _affine(weight, bias, lambda indices: list(indices)[-rank:])
    dims = range(len(x.shape) - rank, len(x.shape))
    return _normalise(emitter, x, list(dims), epsilon, affine, [t for t in (weight, bias) if t is not None])


def _group_norm(
    emitter: Emitter,
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    _: bool = True,
) -> Tensor:
    batch, channels, *rest = shape_of(x)
    size = channels // groups
    grouped = emitter.compute((batch, groups, size, *rest), lambda n, g, c, *i: x(n, g * size + c, *i), [x])
    affine = _affine(weight, bias, lambda indices: [indices[1] * size + indices[2]])
    sources = [t for t in (weight, bias) if t is not None]
    result = _normalise(emitter, grouped, list(range(2, 3 + len(rest))), epsilon, affine, sources)
    return emitter.compute(
        shape_of(x), lambda n, c, *i: result(n, tirx.floordiv(c, size), tirx.floormod(c, size), *i), [result]
    )


def _instance_norm(
    emitter: Emitter,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Any,
    variance: Any,
    use_input: bool,
    _: float,
    epsilon: float,
    *__: Any,
) -> Tensor:
    if not use_input:
        raise UnsupportedError("instance norm with running statistics")
    return _group_norm(emitter, x, shape_of(x)[1], weight, bias, epsilon)


def _cumsum(emitter: Emitter, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    shape = shape_of(x)
    dim = dim % len(shape)
    if shape[dim] > _MAX_CUMSUM_EXTENT:
        raise UnsupportedError(f"cumsum over more than {_MAX_CUMSUM_EXTENT} elements")
    axis = te.reduce_axis((0, shape[dim]), name="reduce")

    def element(*indices: Expr) -> Expr:
        value = cast(x(*indices[:dim], axis, *indices[dim + 1 :]), emitter.dtype)
        return te.sum(tirx.Select(axis.var <= indices[dim], value, number(0, emitter.dtype)), axis=axis)

    return emitter.compute(shape, element, [x], stored=True)


def _any(emitter: Emitter, x: Tensor, dims: Dimensions = None, keep: bool = False) -> Tensor:
    found = _reduce(emitter, x, _dimensions(x, dims), te.max, lambda value: cast(cast(value, "bool"), "int32"), keep)
    return emitter.compute(emitter.shape, lambda *i: cast(found(*i), "bool"), [found])


def _all(emitter: Emitter, x: Tensor, dims: Dimensions = None, keep: bool = False) -> Tensor:
    found = _reduce(emitter, x, _dimensions(x, dims), te.min, lambda value: cast(cast(value, "bool"), "int32"), keep)
    return emitter.compute(emitter.shape, lambda *i: cast(found(*i), "bool"), [found])


REDUCTIONS: dict[str, Converter] = {
    "sum.default": _sum_all,
    "sum.dim_IntList": _sum_entry,
    "mean.default": _mean_all,
    "mean.dim": _mean,
    "amax.default": _extreme_entry(True),
    "amin.default": _extreme_entry(False),
    "max.default": _extreme_entry(True),
    "min.default": _extreme_entry(False),
    "max.dim": _extreme_with_index(True),
    "min.dim": _extreme_with_index(False),
    "argmax.default": _arg(True),
    "argmin.default": _arg(False),
    "any.default": _any,
    "any.dim": _any,
    "all.default": _all,
    "all.dim": _all,
    "var.correction": _variance,
    "std.correction": _deviation,
    "var_mean.correction": _variance_mean,
    "linalg_vector_norm.default": _vector_norm,
    "logsumexp.default": _logsumexp,
    "softmax.int": _softmax,
    "_softmax.default": _softmax,
    "log_softmax.int": _log_softmax,
    "_log_softmax.default": _log_softmax,
    "layer_norm.default": _layer_norm,
    "group_norm.default": _group_norm,
    "instance_norm.default": _instance_norm,
    "cumsum.default": _cumsum,
}
