"""One call or more of every operator that the generic lowering accepts, for `test_generic.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tensor:
    """An argument of a case: shape, dtype, and how its values are drawn."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    low: float = -3.0
    high: float = 3.0

    def make(self, generator: torch.Generator) -> torch.Tensor:
        if self.dtype == torch.float32:
            return torch.rand(self.shape, generator=generator) * (self.high - self.low) + self.low
        if self.dtype == torch.bool:
            return torch.rand(self.shape, generator=generator) > 0.5
        return torch.randint(int(self.low), int(self.high) + 1, self.shape, generator=generator).to(self.dtype)


def real(*shape: int) -> Tensor:
    return Tensor(shape)


def positive(*shape: int) -> Tensor:
    return Tensor(shape, low=0.05, high=4.0)


def integer(*shape: int, low: int = -5, high: int = 5, dtype: torch.dtype = torch.int64) -> Tensor:
    return Tensor(shape, dtype, low, high)


def boolean(*shape: int) -> Tensor:
    return Tensor(shape, torch.bool)


Case = tuple[str, tuple[Any, ...], dict[str, Any]]
X, ROW, VECTORS = real(3, 5, 7, 9), real(1, 5, 1, 1), real(2, 6, 32)
SHAPES = (X, VECTORS)

UNARY = (
    "abs ceil floor round trunc neg sign square exp expm1 sin cos atan erf tanh relu relu6 hardsigmoid hardswish "
    "sigmoid silu selu mish log_sigmoid hardtanh leaky_relu elu celu gelu softplus clone alias contiguous detach"
)
BINARY = "add.Tensor sub.Tensor mul.Tensor maximum.default minimum.default"
COMPARE = "eq ne lt le gt ge"
REDUCE = "sum.dim_IntList mean.dim amax.default amin.default logsumexp.default"


def _elementwise() -> Iterator[Case]:
    for name in UNARY.split():
        for x in SHAPES:
            yield f"{name}.default", (x,), {}
    for name in "log log1p log2 sqrt rsqrt reciprocal".split():
        yield f"{name}.default", (positive(3, 5, 7, 9),), {}


def _binary() -> Iterator[Case]:
    for name in BINARY.split():
        yield from ((name, pair, {}) for pair in ((X, ROW), (real(5, 1, 16), real(4, 1)), (integer(6, 7), integer(7))))
    for name in COMPARE.split():
        yield f"{name}.Scalar", (integer(4, 16), 1), {}
        yield f"{name}.Scalar", (integer(3, 11), 0.5), {}
        yield f"{name}.Tensor", (real(4, 16), real(16)), {}
        yield f"{name}.Tensor", (integer(4, 16), integer(4, 1, dtype=torch.int32)), {}
    for name in "add.Scalar sub.Scalar rsub.Scalar".split():
        yield name, (X, 2.5, 3), {}


def _mixed() -> Iterator[Case]:
    yield "add.Tensor", (X, ROW), {"alpha": 0.5}
    yield "add.Tensor", (integer(4, 9), real(4, 9)), {}
    yield "mul.Tensor", (boolean(4, 9), real(4, 9)), {}
    yield "mul.Tensor", (boolean(4, 9), boolean(4, 9)), {}
    yield "mul.Scalar", (X, -1.5), {}
    yield "div.Scalar", (integer(4, 8), 3), {}
    for other in (positive(5, 1, 1), 1.5):
        for mode in (None, "floor", "trunc"):
            name = "div.Tensor_mode" if isinstance(other, Tensor) else "div.Scalar_mode"
            yield name, (X, other), {"rounding_mode": mode}
    for mode in ("floor", "trunc"):
        yield "div.Tensor_mode", (integer(4, 33, low=-20, high=20), integer(33, low=1, high=7)), {"rounding_mode": mode}
    yield "div.Tensor", (X, positive(9)), {}
    yield "floor_divide.default", (integer(4, 33, low=-20, high=20), integer(33, low=1, high=7)), {}
    yield "remainder.Scalar", (X, 0.75), {}
    yield "remainder.Scalar", (integer(4, 9, low=-9, high=9), 4), {}
    yield "remainder.Tensor", (integer(4, 9, low=-9, high=9), integer(9, low=1, high=4)), {}
    for exponent in (1, 2, 3, 4, -1, 0.5, -0.5, 1.7):
        yield "pow.Tensor_Scalar", (positive(3, 41), exponent), {}
    yield "pow.Tensor_Tensor", (positive(3, 41), real(41)), {}
    yield "pow.Scalar", (1.3, real(3, 41)), {}
    yield "clamp.default", (X, -0.5, 1.0), {}
    yield "clamp.default", (integer(3, 9), None, 2), {}
    yield "clamp.Tensor", (X, ROW, None), {}
    yield "clamp_min.default", (X, 0.1), {}
    yield "clamp_max.default", (X, 0.1), {}
    yield "hardtanh.default", (X, -0.3, 0.7), {}
    yield "leaky_relu.default", (X, 0.2), {}
    yield "elu.default", (X, 1.5, 1.1, 0.7), {}
    yield "celu.default", (X, 0.6), {}
    yield "gelu.default", (X,), {"approximate": "tanh"}
    yield "softplus.default", (X, 2, 3), {}
    yield "prelu.default", (X, real(5)), {}
    yield "prelu.default", (X, real(1)), {}
    yield "logical_and.default", (boolean(4, 33), integer(33)), {}
    yield "logical_or.default", (boolean(4, 33), boolean(4, 1)), {}
    yield "logical_not.default", (integer(4, 33),), {}
    yield "where.self", (boolean(5, 1, 1), X, ROW), {}
    yield "where.self", (boolean(4, 16), real(4, 16), real()), {}
    yield "masked_fill.Scalar", (X, boolean(7, 9), -math.inf), {}
    yield "masked_fill.Tensor", (X, boolean(3, 5, 7, 9), real()), {}
    for dtype in (torch.int32, torch.int64, torch.bool, torch.float32):
        yield "_to_copy.default", (X,), {"dtype": dtype}
        yield "to.dtype", (integer(4, 33), dtype), {}


def _reductions() -> Iterator[Case]:
    for name in REDUCE.split():
        for x, dims in (
            (X, [1]),
            (X, [2, 3]),
            (X, [-1]),
            (X, [0, 2]),
            (VECTORS, [1, 2]),
            (VECTORS, [1]),
            (real(1, 64), [1]),
        ):
            yield name, (x, dims, True), {}
            yield name, (x, dims, False), {}


def _other_reductions() -> Iterator[Case]:
    for name in "sum mean max min any all".split():
        yield f"{name}.default", (real(5, 7, 16),), {}
    yield "sum.dim_IntList", (integer(4, 33), [1]), {}
    yield "sum.dim_IntList", (boolean(4, 33), [0]), {}
    for name in "max.dim min.dim argmax.default argmin.default".split():
        for x, dim in ((X, 1), (VECTORS, -1), (integer(6, 40, low=0, high=3), 1)):
            yield name, (x, dim), {}
            yield name, (x, dim, True), {}
    for name in "any.dim all.dim".split():
        yield name, (boolean(4, 33), 1), {}
        yield name, (integer(3, 4, 16, low=0, high=1), 1, True), {}
    for name in "var.correction std.correction var_mean.correction".split():
        yield name, (X, [2, 3]), {"correction": 1, "keepdim": True}
        yield name, (VECTORS, [-1]), {"correction": 0}
        yield name, (VECTORS, None), {}
    for order in (1, 2):
        yield "linalg_vector_norm.default", (X, order, [1], True), {}
        yield "linalg_vector_norm.default", (VECTORS, order, [-1], False), {}
    for name in "softmax.int log_softmax.int".split():
        yield from (
            (name, (x, dim), {}) for x, dim in ((X, 1), (X, -1), (VECTORS, -1), (VECTORS, 0), (real(2, 4, 49, 49), -1))
        )
    for name in "_softmax.default _log_softmax.default".split():
        yield name, (VECTORS, 1, False), {}
    yield "layer_norm.default", (VECTORS, [32], real(32), real(32), 1e-6), {}
    yield "layer_norm.default", (X, [7, 9]), {}
    yield "group_norm.default", (real(3, 6, 5, 7), 3, real(6), real(6), 1e-5), {}
    yield "group_norm.default", (real(2, 8, 16), 2), {}
    yield "instance_norm.default", (X, real(5), real(5), None, None, True, 0.1, 1e-5, False), {}
    yield "cumsum.default", (X, 1), {}
    yield "cumsum.default", (integer(4, 33), -1), {}
    yield "cumsum.default", (boolean(4, 33), -1), {}


def _movement() -> Iterator[Case]:
    yield "view.default", (X, [15, 63]), {}
    yield "view.default", (VECTORS, [2, 3, 2, 4, 8]), {}
    yield "reshape.default", (X, [-1]), {}
    yield "_unsafe_view.default", (VECTORS, [12, 32]), {}
    yield "flatten.using_ints", (X, 1, 2), {}
    yield "unflatten.int", (VECTORS, 1, [3, 2]), {}
    yield "squeeze.default", (ROW,), {}
    yield "squeeze.dim", (ROW, 0), {}
    yield "squeeze.dims", (ROW, [0, 3]), {}
    yield "unsqueeze.default", (X, -2), {}
    yield "permute.default", (X, [0, 2, 3, 1]), {}
    yield "permute.default", (real(3, 5, 8, 16), [0, -1, 1, 2]), {}
    yield "transpose.int", (X, 1, -1), {}
    yield "expand.default", (ROW, [3, -1, 4, 9]), {}
    yield "expand.default", (real(5, 1), [2, 5, 6]), {}
    yield "select.int", (X, 1, -2), {}
    yield "slice.Tensor", (X, 2, 1, 6, 2), {}
    yield "slice.Tensor", (X, -1, -4, 9223372036854775807), {}
    yield "slice.Tensor", (VECTORS, 0), {}
    yield "narrow.default", (X, 3, 2, 5), {}
    yield "split.Tensor", (VECTORS, 4, 1), {}
    yield "split_with_sizes.default", (X, [2, 3], 1), {}
    yield "chunk.default", (X, 2, -1), {}
    yield "unbind.int", (VECTORS, 1), {}
    yield "glu.default", (VECTORS, 1), {}
    yield "glu.default", (VECTORS,), {}
    yield "cat.default", ([X, real(3, 2, 7, 9), X], 1), {}
    yield "cat.default", ([real(4, 5), real(4, 16), integer(4, 3)], -1), {}
    yield "stack.default", ([VECTORS, VECTORS, real(2, 6, 32)], 1), {}
    yield "stack.default", ([real(5, 7), real(5, 7)], -1), {}
    yield "repeat.default", (real(3, 5), [2, 2, 3]), {}
    yield "flip.default", (X, [1, -1]), {}
    yield "roll.default", (X, [3, -10], [2, 3]), {}
    yield "roll.default", (real(1, 8, 8, 16), [-3, -3], [1, 2]), {}
    yield "pixel_shuffle.default", (real(2, 12, 5, 7), 2), {}
    yield "pixel_unshuffle.default", (real(2, 3, 9, 12), 3), {}
    yield "channel_shuffle.default", (real(2, 6, 5, 8), 3), {}
    for name in "tril triu".split():
        yield f"{name}.default", (real(3, 9, 11), -1), {}
    yield "index_select.default", (X, 2, integer(4, low=0, high=6)), {}
    yield "gather.default", (X, -1, integer(3, 5, 7, 4, low=0, high=8)), {}
    yield "embedding.default", (real(11, 16), integer(3, 4, low=0, high=10)), {}
    yield "index.Tensor", (X, [None, integer(4, 1, low=-5, high=4), integer(3, low=-7, high=6)]), {}
    yield "pad.default", (X, [1, 2, 0, 3]), {}
    yield "pad.default", (X, [-1, 2, 3, -2], "constant", 1.5), {}
    for mode in ("reflect", "replicate", "circular"):
        yield "pad.default", (X, [2, 3, 1, 4], mode), {}
    yield "constant_pad_nd.default", (real(2, 5, 16), [0, 0, 1, 2], -1.0), {}
    for kind in "reflection replication".split():
        yield f"{kind}_pad1d.default", (real(2, 5, 9), [3, 2]), {}
        yield f"{kind}_pad2d.default", (X, [3, 2, 0, 1]), {}


def _resampling() -> Iterator[Case]:
    for out, factors in (([15, 20], None), ([3, 4], None), (None, [2.0, 2.0]), (None, [1.7, 0.6])):
        for name in "upsample_nearest2d _upsample_nearest_exact2d".split():
            yield f"{name}.vec", (X, out, factors), {}
        for name in "upsample_bilinear2d upsample_bicubic2d".split():
            yield f"{name}.vec", (X, out, False, factors), {}
            yield f"{name}.vec", (X, out, True, factors), {}
    yield "upsample_nearest1d.vec", (real(2, 5, 9), [14], None), {}
    yield "upsample_linear1d.vec", (real(2, 5, 9), [14], False, None), {}


CASES: list[Case] = [
    *_elementwise(),
    *_binary(),
    *_mixed(),
    *_reductions(),
    *_other_reductions(),
    *_movement(),
    *_resampling(),
]
