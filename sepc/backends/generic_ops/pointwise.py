"""ATen operators that work element by element, with broadcasting and type promotion as PyTorch infers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tvm import te, tirx

from sepc.backends.generic_ops.emitter import (
    DTYPES,
    Converter,
    Emitter,
    Expr,
    Tensor,
    UnsupportedError,
    broadcast_read,
    cast,
    dtype_of,
    is_float,
    let,
    like,
    number,
    shape_of,
)
from sepc.backends.stages import math as vector_math


def _promoted(args: Sequence[Any]) -> str:
    values = [
        torch.empty(shape_of(a), dtype=_torch_dtype(a), device="meta") if isinstance(a, te.Tensor) else a for a in args
    ]
    return DTYPES[torch.result_type(*values)] if len(values) == 2 else dtype_of(args[0])


def _torch_dtype(tensor: Tensor) -> torch.dtype:
    return next(key for key, name in DTYPES.items() if name == dtype_of(tensor))


def _operand(argument: Any, names: Mapping[Tensor, Expr], dtype: str) -> Any:
    if isinstance(argument, te.Tensor):
        return names[argument]
    return number(argument, dtype) if isinstance(argument, int | float) else argument


def pointwise(function: Callable[..., Expr], promote: bool = False) -> Converter:
    """A converter that applies `function(emitter, *elements)` to broadcast tensors; numbers arrive as constants.

    Operands are converted to the dtype of the result, or to their own promoted dtype where `promote` is set, as in
    comparisons.
    """

    def convert(emitter: Emitter, *args: Any) -> Tensor:
        dtype = _promoted(args) if promote else emitter.dtype
        tensors = list(dict.fromkeys(a for a in args if isinstance(a, te.Tensor)))

        def element(*indices: Expr) -> Expr:
            reads = {tensor: cast(broadcast_read(tensor, indices), dtype) for tensor in tensors}
            # Each operand is read once, however often the function names it. (TVM cannot name vectors of booleans.)
            names = reads if dtype == "bool" else {tensor: tirx.Var("x", dtype) for tensor in tensors}
            result = cast(function(emitter, *(_operand(argument, names, dtype) for argument in args)), emitter.dtype)
            for tensor in tensors if dtype != "bool" else ():
                result = tirx.Let(names[tensor], reads[tensor], result)
            return result

        return emitter.compute(emitter.shape, element, tensors)

    return convert


def _binary(function: Callable[[Expr, Expr], Expr]) -> Converter:
    return pointwise(lambda _, a, b: function(a, b))


def _compare(function: Callable[[Expr, Expr], Expr]) -> Converter:
    return pointwise(lambda _, a, b: function(a, b), promote=True)


def _unary(function: Callable[[Expr], Expr]) -> Converter:
    return pointwise(lambda _, x: function(x))


def _libm(function: Callable[..., Expr]) -> Converter:
    return pointwise(lambda emitter, *values: emitter.library(function, *values))


def _polynomial(function: Callable[[Expr], Expr]) -> Converter:
    return pointwise(lambda emitter, x: emitter.vectorisable(function, x))


def _clamp(_: Emitter, x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
    if low is not None:
        x = tirx.max(low, x)  # the bound first: so that NaN in x stays
    return x if high is None else tirx.min(high, x)


def _sigmoid(emitter: Emitter, x: Expr) -> Expr:
    return like(1, x) / (like(1, x) + emitter.exp(like(0, x) - x))


def _softplus_of(emitter: Emitter, x: Expr) -> Expr:
    # log1p(exp(x)) = max(x, 0) + log1p(exp(-|x|)): no overflow, and no cancellation for x very negative.
    small = emitter.exp(tirx.min(x, like(0, x) - x))
    return tirx.max(x, like(0, x)) + let(small, _log1p_of_fraction)


def _log1p_of_fraction(x: Expr) -> Expr:
    """log(1 + x) for x in [0, 1]: 2 artanh(s) with s = x / (2 + x) <= 1/3, a series whose ninth term is below 2e-9."""

    def series(s: Expr) -> Expr:
        square, total = s * s, like(1 / 15, s)
        for divisor in (13, 11, 9, 7, 5, 3, 1):
            total = total * square + like(1 / divisor, s)
        return like(2, s) * s * total

    return let(x / (like(2, x) + x), series)


def _softplus(emitter: Emitter, x: Expr, beta: Expr, threshold: Expr) -> Expr:
    return let(x * beta, lambda scaled: tirx.Select(scaled > threshold, x, _softplus_of(emitter, scaled) / beta))


def _elu(emitter: Emitter, x: Expr, alpha: Expr, scale: Expr, input_scale: Expr) -> Expr:
    negative = (emitter.exp(tirx.min(x * input_scale, like(0, x))) - like(1, x)) * alpha
    return scale * tirx.Select(x > like(0, x), x, negative)


def _selu(emitter: Emitter, x: Expr) -> Expr:
    constants = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
    return _elu(emitter, x, *(like(value, x) for value in constants))


def _celu(emitter: Emitter, x: Expr, alpha: Expr) -> Expr:
    negative = (emitter.exp(tirx.min(x / alpha, like(0, x))) - like(1, x)) * alpha
    return tirx.Select(x > like(0, x), x, negative)


def _gelu(emitter: Emitter, x: Expr, approximate: str) -> Expr:
    if approximate == "none":
        return emitter.vectorisable(vector_math.gelu, x)
    inner = like(0.7978845608028654, x) * (x + like(0.044715, x) * x * x * x)
    return like(0.5, x) * x * (like(1, x) + emitter.vectorisable(vector_math.tanh, inner))


def _mish(emitter: Emitter, x: Expr) -> Expr:
    # tanh(log(1 + e)) = (e² + 2e) / (e² + 2e + 2) with e = exp(x): no logarithm; beyond 20 the ratio is 1 in float32.
    def ratio(e: Expr) -> Expr:
        return e * (e + like(2, x)) / (e * (e + like(2, x)) + like(2, x))

    return x * let(emitter.exp(tirx.min(x, like(20, x))), ratio)


def _floor_divide(a: Expr, b: Expr) -> Expr:
    return tirx.floor(a / b) if is_float(a) else tirx.floordiv(a, b)


def _truncate_divide(a: Expr, b: Expr) -> Expr:
    return tirx.trunc(a / b) if is_float(a) else tirx.truncdiv(a, b)


def _remainder(a: Expr, b: Expr) -> Expr:
    return a - b * tirx.floor(a / b) if is_float(a) else tirx.floormod(a, b)


def _divide_mode(emitter: Emitter, a: Tensor, b: Tensor, rounding_mode: str | None) -> Tensor:
    functions = {None: lambda x, y: x / y, "floor": _floor_divide, "trunc": _truncate_divide}
    return _binary(functions[rounding_mode])(emitter, a, b)


def _sign(x: Expr) -> Expr:
    one, zero = like(1, x), like(0, x)
    return tirx.Select(x > zero, one, tirx.Select(x < zero, zero - one, x * zero))


def _power(emitter: Emitter, base: Tensor, exponent: float) -> Tensor:
    simple: dict[float, Callable[[Expr], Expr]] = {
        1: lambda x: x,
        2: lambda x: x * x,
        3: lambda x: x * x * x,
        4: lambda x: let(x * x, lambda y: y * y),
        0.5: tirx.sqrt,
        -0.5: lambda x: like(1, x) / tirx.sqrt(x),
        -1: lambda x: like(1, x) / x,
    }
    if exponent in simple:
        return _unary(simple[exponent])(emitter, base)
    if emitter.dtype != "float32":
        raise UnsupportedError(f"integer power {exponent}")
    return _libm(tirx.pow)(emitter, base, exponent)


def _prelu(emitter: Emitter, x: Tensor, weight: Tensor) -> Tensor:
    def element(*indices: Expr) -> Expr:
        channel = indices[1] if len(indices) > 1 and shape_of(weight) != (1,) else tirx.const(0, "int32")
        slope = weight(channel) if weight.shape else weight()
        return let(x(*indices), lambda v: tirx.Select(v > like(0, v), v, v * slope))

    return emitter.compute(emitter.shape, element, [x, weight])


def _where(emitter: Emitter, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    def element(*indices: Expr) -> Expr:
        chosen = cast(broadcast_read(condition, indices), "bool")
        return tirx.Select(chosen, *(cast(broadcast_read(x, indices), emitter.dtype) for x in (a, b)))

    return emitter.compute(emitter.shape, element, [condition, a, b])


def _masked_fill(emitter: Emitter, x: Tensor, mask: Tensor, value: float | Tensor) -> Tensor:
    filler = value if isinstance(value, te.Tensor) else emitter.compute((), lambda: number(value, emitter.dtype))
    return _where(emitter, mask, filler, x)


def _convert(emitter: Emitter, x: Tensor, *_: Any) -> Tensor:
    return _unary(lambda value: value)(emitter, x)


# What gives back its operand, in another type or the same one.
CONVERSIONS: dict[str, Converter] = dict.fromkeys(
    "clone.default alias.default contiguous.default detach.default _to_copy.default to.dtype".split(), _convert
)


def _added(scale_sign: int) -> Converter:
    def combine(_: Emitter, a: Expr, b: Expr, alpha: Expr) -> Expr:
        scaled = b if int(alpha.value) == 1 and float(alpha.value) == 1.0 else b * alpha
        return a + scaled if scale_sign > 0 else a - scaled

    return pointwise(combine)


POINTWISE: dict[str, Converter] = {
    "abs.default": _unary(tirx.abs),
    "add.Tensor": _added(1),
    "add.Scalar": _added(1),
    "sub.Tensor": _added(-1),
    "sub.Scalar": _added(-1),
    "rsub.Scalar": pointwise(lambda _, a, b, alpha: b - a * alpha),
    "mul.Tensor": _binary(lambda a, b: tirx.And(a, b) if str(a.ty.dtype) == "bool" else a * b),
    "mul.Scalar": _binary(lambda a, b: a * b),
    "div.Tensor": _binary(lambda a, b: a / b),
    "div.Scalar": _binary(lambda a, b: a / b),
    "div.Tensor_mode": _divide_mode,
    "div.Scalar_mode": _divide_mode,
    "floor_divide.default": _binary(_floor_divide),
    "remainder.Scalar": _binary(_remainder),
    "remainder.Tensor": _binary(_remainder),
    "maximum.default": _binary(tirx.max),
    "minimum.default": _binary(tirx.min),
    "eq.Scalar": _compare(tirx.EQ),
    "eq.Tensor": _compare(tirx.EQ),
    "ne.Scalar": _compare(tirx.NE),
    "ne.Tensor": _compare(tirx.NE),
    "lt.Scalar": _compare(lambda a, b: a < b),
    "lt.Tensor": _compare(lambda a, b: a < b),
    "le.Scalar": _compare(lambda a, b: a <= b),
    "le.Tensor": _compare(lambda a, b: a <= b),
    "gt.Scalar": _compare(lambda a, b: a > b),
    "gt.Tensor": _compare(lambda a, b: a > b),
    "ge.Scalar": _compare(lambda a, b: a >= b),
    "ge.Tensor": _compare(lambda a, b: a >= b),
    "logical_and.default": _binary(tirx.And),
    "logical_or.default": _binary(tirx.Or),
    "logical_not.default": _unary(tirx.Not),
    "where.self": _where,
    "masked_fill.Scalar": _masked_fill,
    "masked_fill.Tensor": _masked_fill,
    "ceil.default": _unary(tirx.ceil),
    "floor.default": _unary(tirx.floor),
    "round.default": _unary(tirx.nearbyint),
    "trunc.default": _unary(tirx.trunc),
    "neg.default": _unary(lambda x: like(0, x) - x if not is_float(x) else x * like(-1, x)),
    "reciprocal.default": _unary(lambda x: like(1, x) / x),
    "rsqrt.default": _unary(lambda x: like(1, x) / tirx.sqrt(x)),
    "sign.default": _unary(_sign),
    "sqrt.default": _unary(tirx.sqrt),
    "square.default": _unary(lambda x: x * x),
    "exp.default": pointwise(lambda emitter, x: emitter.exp(x)),
    "expm1.default": _libm(lambda x: tirx.call_pure_extern("float32", "expm1f", x)),
    "log.default": _libm(tirx.log),
    "log1p.default": _libm(tirx.log1p),
    "log2.default": _libm(tirx.log2),
    "sin.default": _libm(tirx.sin),
    "cos.default": _libm(tirx.cos),
    "atan.default": _libm(tirx.atan),
    "erf.default": _polynomial(vector_math.erf),
    "tanh.default": _polynomial(vector_math.tanh),
    "pow.Tensor_Scalar": _power,
    "pow.Tensor_Tensor": _libm(tirx.pow),
    "pow.Scalar": _libm(tirx.pow),
    "clamp.default": pointwise(_clamp),
    "clamp.Tensor": pointwise(_clamp),
    "clamp_min.default": pointwise(_clamp),
    "clamp_max.default": pointwise(lambda emitter, x, high: _clamp(emitter, x, None, high)),
    "hardtanh.default": pointwise(_clamp),
    "relu.default": _unary(lambda x: tirx.max(like(0, x), x)),
    "relu6.default": _unary(lambda x: tirx.min(like(6, x), tirx.max(like(0, x), x))),
    "hardsigmoid.default": pointwise(lambda e, x: _clamp(e, x + like(3, x), like(0, x), like(6, x)) * like(1 / 6, x)),
    "hardswish.default": pointwise(lambda e, x: x * _clamp(e, x + like(3, x), like(0, x), like(6, x)) * like(1 / 6, x)),
    "leaky_relu.default": pointwise(lambda _, x, slope: tirx.Select(x > like(0, x), x, x * slope)),
    "prelu.default": _prelu,
    "sigmoid.default": pointwise(_sigmoid),
    "silu.default": pointwise(lambda emitter, x: x * _sigmoid(emitter, x)),
    "gelu.default": pointwise(_gelu),
    "elu.default": pointwise(_elu),
    "selu.default": pointwise(_selu),
    "celu.default": pointwise(_celu),
    "mish.default": pointwise(_mish),
    "softplus.default": pointwise(_softplus),
    "log_sigmoid.default": pointwise(lambda e, x: like(0, x) - _softplus_of(e, like(0, x) - x)),
    **CONVERSIONS,
}
