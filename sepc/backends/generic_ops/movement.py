"""ATen operators that move data: views, slices, concatenation, padding, gathers, and resampling with fixed taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from tvm import tirx

from sepc.backends.generic_ops.emitter import (
    Converter,
    Emitter,
    Expr,
    Tensor,
    UnsupportedError,
    broadcast_read,
    cast,
    like,
    number,
    shape_of,
)

IndexMap = Callable[[list[Expr]], Sequence[Expr]]


def _moved(emitter: Emitter, x: Tensor, source: IndexMap, shape: Sequence[int] | None = None) -> Tensor:
    """The tensor whose element at `indices` is `x` at `source(indices)`."""
    return emitter.compute(emitter.shape if shape is None else shape, lambda *i: x(*source(list(i))), [x])


def _reshape(emitter: Emitter, x: Tensor, *_: Any) -> Tensor:
    old, new = shape_of(x), emitter.shape

    def source(indices: list[Expr]) -> list[Expr]:
        flat: Expr = tirx.const(0, "int32")
        for index, extent in zip(indices, new, strict=True):
            flat = flat * extent + index
        result: list[Expr] = []
        for extent in reversed(old):
            result.insert(0, tirx.floormod(flat, extent))
            flat = tirx.floordiv(flat, extent)
        return result

    return _moved(emitter, x, source)


def _permute(emitter: Emitter, x: Tensor, order: Sequence[int]) -> Tensor:
    rank = len(order)
    return _moved(emitter, x, lambda i: [i[[d % rank for d in order].index(dim)] for dim in range(rank)])


def _transpose(emitter: Emitter, x: Tensor, a: int, b: int) -> Tensor:
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return _permute(emitter, x, order)


def _expand(emitter: Emitter, x: Tensor, *_: Any) -> Tensor:
    return emitter.compute(emitter.shape, lambda *i: broadcast_read(x, i), [x])


def _select(emitter: Emitter, x: Tensor, dim: int, index: int) -> Tensor:
    dim, extent = dim % len(x.shape), shape_of(x)[dim]
    return _moved(emitter, x, lambda i: [*i[:dim], tirx.const(index % extent, "int32"), *i[dim:]])


def _window(emitter: Emitter, x: Tensor, dim: int, start: int, shape: Sequence[int], step: int = 1) -> Tensor:
    return _moved(emitter, x, lambda i: [*i[:dim], i[dim] * step + start, *i[dim + 1 :]], shape)


def _slice(emitter: Emitter, x: Tensor, dim: int, start: int | None, end: int | None, step: int) -> Tensor:
    dim = dim % len(x.shape)
    return _window(emitter, x, dim, range(shape_of(x)[dim])[start:end:step].start, emitter.shape, step)


def _narrow(emitter: Emitter, x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return _slice(emitter, x, dim, start, start + length if start >= 0 else None, 1)


def _split(emitter: Emitter, x: Tensor, _: Any, dim: int = 0) -> tuple[Tensor, ...]:
    parts, start = [], 0
    dim = dim % len(x.shape)
    for part in emitter.out:
        parts.append(_window(emitter, x, dim, start, tuple(part.shape)))
        start += int(part.shape[dim])
    return tuple(parts)


def _unbind(emitter: Emitter, x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    return tuple(_select(emitter, x, dim, index) for index in range(shape_of(x)[dim]))


def _glu(emitter: Emitter, x: Tensor, dim: int = -1) -> Tensor:
    dim = dim % len(x.shape)
    half = shape_of(x)[dim] // 2

    def element(*indices: Expr) -> Expr:
        gate = x(*indices[:dim], indices[dim] + half, *indices[dim + 1 :])
        return x(*indices) / (like(1, gate) + emitter.exp(like(0, gate) - gate))

    return emitter.compute(emitter.shape, element, [x])


def _concatenate(emitter: Emitter, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    parts = [tensor for tensor in tensors if shape_of(tensor) != (0,)]  # PyTorch's legacy empty operand
    dim = dim % len(parts[0].shape)

    ends = list(accumulate(shape_of(part)[dim] for part in parts))
    starts = [0, *ends]

    def read(position: int, indices: Sequence[Expr]) -> Expr:
        own = [*indices[:dim], indices[dim] - starts[position], *indices[dim + 1 :]]
        return cast(parts[position](*own), emitter.dtype)

    def element(*indices: Expr) -> Expr:
        result = read(len(parts) - 1, indices)
        for position in reversed(range(len(parts) - 1)):
            result = tirx.if_then_else(indices[dim] < ends[position], read(position, indices), result)
        return result

    return emitter.compute(emitter.shape, element, parts)


def _stack(emitter: Emitter, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dim = dim % len(emitter.shape)

    def element(*indices: Expr) -> Expr:
        rest = [*indices[:dim], *indices[dim + 1 :]]
        result = cast(tensors[-1](*rest), emitter.dtype)
        for position in reversed(range(len(tensors) - 1)):
            result = tirx.if_then_else(
                tirx.EQ(indices[dim], position), cast(tensors[position](*rest), emitter.dtype), result
            )
        return result

    return emitter.compute(emitter.shape, element, tensors)


def _repeat(emitter: Emitter, x: Tensor, _: Sequence[int]) -> Tensor:
    shape = shape_of(x)
    return _moved(
        emitter,
        x,
        lambda i: [tirx.floormod(index, n) for index, n in zip(i[len(i) - len(shape) :], shape, strict=True)],
    )


def _flip(emitter: Emitter, x: Tensor, dims: Sequence[int]) -> Tensor:
    shape = shape_of(x)
    flipped = {dim % len(shape) for dim in dims}
    return _moved(emitter, x, lambda i: [shape[d] - 1 - index if d in flipped else index for d, index in enumerate(i)])


def _roll(emitter: Emitter, x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        raise UnsupportedError("roll of the flattened tensor")
    shape = shape_of(x)
    offset = [0] * len(shape)
    for shift, dim in zip(shifts, dims, strict=True):
        offset[dim] = (offset[dim] + shift) % shape[dim]

    def wrapped(index: Expr, by: int, size: int) -> Expr:
        # Not by a remainder: TVM 0.27 merges those of two dimensions whose loops are fused, and loses a shift.
        return tirx.Select(index < by, index - by + size, index - by) if by else index

    return _moved(emitter, x, lambda i: [wrapped(*entry) for entry in zip(i, offset, shape, strict=True)])


def _pixel_shuffle(emitter: Emitter, x: Tensor, factor: int) -> Tensor:
    def source(i: list[Expr]) -> list[Expr]:
        channel = (i[-3] * factor + tirx.floormod(i[-2], factor)) * factor + tirx.floormod(i[-1], factor)
        return [*i[:-3], channel, tirx.floordiv(i[-2], factor), tirx.floordiv(i[-1], factor)]

    return _moved(emitter, x, source)


def _pixel_unshuffle(emitter: Emitter, x: Tensor, factor: int) -> Tensor:
    def source(i: list[Expr]) -> list[Expr]:
        phase = tirx.floormod(i[-3], factor * factor)
        row = i[-2] * factor + tirx.floordiv(phase, factor)
        return [*i[:-3], tirx.floordiv(i[-3], factor * factor), row, i[-1] * factor + tirx.floormod(phase, factor)]

    return _moved(emitter, x, source)


def _channel_shuffle(emitter: Emitter, x: Tensor, groups: int) -> Tensor:
    size = shape_of(x)[1] // groups
    return _moved(
        emitter, x, lambda i: [i[0], tirx.floormod(i[1], groups) * size + tirx.floordiv(i[1], groups), *i[2:]]
    )


def _triangle(lower: bool) -> Converter:
    def convert(emitter: Emitter, x: Tensor, diagonal: int = 0) -> Tensor:
        def element(*indices: Expr) -> Expr:
            offset = indices[-1] - indices[-2]
            kept = offset <= diagonal if lower else offset >= diagonal
            return tirx.Select(kept, x(*indices), number(0, emitter.dtype))

        return emitter.compute(emitter.shape, element, [x])

    return convert


# ---- indices that are data -----------------------------------------------------------------------------------------


def _safe(index: Expr, extent: int) -> Expr:
    """`index` as int32, from the end where negative; limited, as no data may make kernels overrun memory."""
    index = tirx.Cast("int32", index)
    wrapped = tirx.Select(index < 0, index + extent, index)
    return tirx.max(tirx.const(0, "int32"), tirx.min(tirx.const(extent - 1, "int32"), wrapped))


def _index_select(emitter: Emitter, x: Tensor, dim: int, index: Tensor) -> Tensor:
    dim = dim % len(x.shape)
    extent = shape_of(x)[dim]
    return emitter.compute(
        emitter.shape, lambda *i: x(*i[:dim], _safe(index(i[dim]), extent), *i[dim + 1 :]), [x, index]
    )


def _gather(emitter: Emitter, x: Tensor, dim: int, index: Tensor, _: bool = False) -> Tensor:
    dim = dim % len(x.shape)
    extent = shape_of(x)[dim]
    return emitter.compute(emitter.shape, lambda *i: x(*i[:dim], _safe(index(*i), extent), *i[dim + 1 :]), [x, index])


def _embedding(emitter: Emitter, weight: Tensor, indices: Tensor, *_: Any) -> Tensor:
    return emitter.compute(
        emitter.shape, lambda *i: weight(_safe(indices(*i[:-1]), shape_of(weight)[0]), i[-1]), [weight, indices]
    )


def _index(emitter: Emitter, x: Tensor, indices: Sequence[Any]) -> Tensor:
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)) or any(str(indices[dim].dtype) == "bool" for dim in used):
        raise UnsupportedError("indexing by masks, or by tensors in dimensions that are not neighbours")
    rank = max(len(indices[dim].shape) for dim in used)
    first, shape = used[0], shape_of(x)

    def element(*i: Expr) -> Expr:
        chosen = [_safe(broadcast_read(indices[dim], i[first : first + rank]), shape[dim]) for dim in used]
        return x(*i[:first], *chosen, *i[first + rank :])

    return emitter.compute(emitter.shape, element, [x, *(indices[dim] for dim in used)])


# ---- padding -------------------------------------------------------------------------------------------------------


def _pad_index(mode: str, index: Expr, extent: int) -> Expr:
    zero, last = tirx.const(0, "int32"), tirx.const(extent - 1, "int32")
    if mode == "replicate":
        return tirx.max(zero, tirx.min(last, index))
    if mode == "circular":
        return tirx.floormod(index + extent, extent)
    mirrored = tirx.max(index, zero - index)
    return tirx.min(mirrored, 2 * (extent - 1) - mirrored)


def _pad(
    emitter: Emitter, x: Tensor, padding: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    shape = shape_of(x)
    before = {len(shape) - 1 - pair: padding[2 * pair] for pair in range(len(padding) // 2)}
    moving = [d for d in before if padding[2 * (len(shape) - 1 - d)] or padding[2 * (len(shape) - 1 - d) + 1]]

    def element(*indices: Expr) -> Expr:
        own = [index - before.get(dim, 0) for dim, index in enumerate(indices)]
        if mode != "constant":
            return x(*[_pad_index(mode, index, shape[d]) if d in moving else index for d, index in enumerate(own)])
        inside = tirx.all(*[c for d in moving for c in (own[d] >= 0, own[d] < shape[d])]) if moving else None
        return x(*own) if inside is None else tirx.if_then_else(inside, x(*own), number(value or 0, emitter.dtype))

    return emitter.compute(emitter.shape, element, [x])


def _pad_as(mode: str) -> Converter:
    return lambda emitter, x, padding: _pad(emitter, x, padding, mode)


MOVEMENT: dict[str, Converter] = {
    "view.default": _reshape,
    "reshape.default": _reshape,
    "_unsafe_view.default": _reshape,
    "flatten.using_ints": _reshape,
    "unflatten.int": _reshape,
    "squeeze.default": _reshape,
    "squeeze.dim": _reshape,
    "squeeze.dims": _reshape,
    "unsqueeze.default": _reshape,
    "permute.default": _permute,
    "transpose.int": _transpose,
    "expand.default": _expand,
    "select.int": _select,
    "slice.Tensor": _slice,
    "narrow.default": _narrow,
    "split.Tensor": _split,
    "split_with_sizes.default": _split,
    "chunk.default": _split,
    "unbind.int": _unbind,
    "glu.default": _glu,
    "cat.default": _concatenate,
    "stack.default": _stack,
    "repeat.default": _repeat,
    "flip.default": _flip,
    "roll.default": _roll,
    "pixel_shuffle.default": _pixel_shuffle,
    "pixel_unshuffle.default": _pixel_unshuffle,
    "channel_shuffle.default": _channel_shuffle,
    "tril.default": _triangle(True),
    "triu.default": _triangle(False),
    "index_select.default": _index_select,
    "gather.default": _gather,
    "embedding.default": _embedding,
    "index.Tensor": _index,
    "pad.default": _pad,
    "constant_pad_nd.default": lambda emitter, x, padding, value=0: _pad(emitter, x, padding, "constant", value),
    "reflection_pad1d.default": _pad_as("reflect"),
    "reflection_pad2d.default": _pad_as("reflect"),
    "replication_pad1d.default": _pad_as("replicate"),
    "replication_pad2d.default": _pad_as("replicate"),
}
