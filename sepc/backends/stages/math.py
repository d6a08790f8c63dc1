"""Transcendental functions on vectors, as polynomials: TVM's own become one scalar library call per lane.

Each takes and returns a float32 expression of any number of lanes (`clamp`, `maximum` and `minimum` also of float16).
Relative errors against float64, over the range where the result is a normal number: exp 3e-7, sigmoid 4e-7, silu 4e-7;
absolute errors: tanh 2.4e-7, erf 2.6e-7, gelu 1e-6, gelu_tanh 1e-6. NaN propagates: every minimum and maximum has its
constant first, which returns the other operand where that is NaN.

exp(x) is 2^n · e^r with n the integer next to x / ln 2. Adding 1.5 · 2^23 rounds to it, and leaves n in the low bits
of the sum, from where a shift moves it into the exponent; ln 2 is one float32, since a fused multiply-add rounds once:
over the range the error is at most 126 · 1.9e-9. The polynomials of exp and gelu are minimax fits of our own (degree 5;
degrees 13 / 8 of the rational function); tanh and erf are the rational minimax approximations that Eigen uses.

Cycles per vector of 16 on Zen 5, in the first-level cache: silu 6.2, gelu 8.8. Division overlaps with the rest, so that
approximate reciprocals with a Newton step were slower (silu 9.6 against 7.6 at the time).
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.vector import Expr, constant, lanes_of, type_of


def _like(value: float, x: Expr) -> Expr:
    return constant(value, lanes_of(x), type_of(x))


def clamp(x: Expr, low: float | None, high: float | None) -> Expr:
    """`x` limited to `[low, high]`; either bound may be missing. NaN stays NaN."""
    if low is not None:
        x = tirx.max(_like(low, x), x)
    return x if high is None else tirx.min(_like(high, x), x)


def maximum(left: Expr, right: Expr) -> Expr:
    """The larger of both; NaN where either is NaN, unlike `tirx.max`."""
    return tirx.call_llvm_pure_intrin(left.ty.dtype, "llvm.maximum", left, right)


def minimum(left: Expr, right: Expr) -> Expr:
    """The smaller of both; NaN where either is NaN, unlike `tirx.min`."""
    return tirx.call_llvm_pure_intrin(left.ty.dtype, "llvm.minimum", left, right)


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    result = _like(coefficients[0], x)
    for coefficient in coefficients[1:]:
        result = result * x + _like(coefficient, x)
    return result


_LN2 = 0.6931471805599453
# Rounds to an integer n; the low bits become n + 127, the biased exponent of 2^n.
_ROUND = 12582912.0 + 127.0
# Where 2^n is a normal number.
_LOWEST, _HIGHEST = -87.33654, 88.37626


def _fused(left: Expr, right: Expr, addend: Expr) -> Expr:
    """left · right + addend, rounded once."""
    return tirx.call_llvm_pure_intrin(left.ty.dtype, "llvm.fma", left, right, addend)


def _exp(x: Expr, sign: int = 1) -> tuple[Expr, Expr]:
    """Two factors of e to the power of sign · x, the first between 0.7 and 1.42, the second a power of 2."""
    lanes = lanes_of(x)
    suffix = "" if lanes == 1 else f"x{lanes}"
    x = T.Bind(clamp(x, min(sign * _LOWEST, sign * _HIGHEST), max(sign * _LOWEST, sign * _HIGHEST)))
    rounded = T.Bind(_fused(x, _like(sign / _LN2, x), _like(_ROUND, x)))
    exponent = T.Bind(rounded - _like(_ROUND, x))
    rest = T.Bind(_fused(exponent, _like(-sign * _LN2, x), x))  # sign · r
    series = _polynomial(
        rest,
        [
            sign * 0.008312488906085491,
            0.04189015552401543,
            sign * 0.16667114198207855,
            0.499992311000824,
            sign,
            1.0,
        ],
    )
    bits = tirx.shift_left(tirx.reinterpret("int32" + suffix, rounded), constant(23, lanes, "int32"))
    return series, tirx.reinterpret("float32" + suffix, bits)


def exp(x: Expr) -> Expr:
    """e to the power of `x`; saturates below -87.3 and above 88.4."""
    series, scale = _exp(x)
    return series * scale


def _one_plus_exp_minus(x: Expr) -> Expr:
    """1 + e to the power of -x."""
    series, scale = _exp(x, -1)
    return _fused(series, scale, _like(1, x))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    return _like(1, x) / _one_plus_exp_minus(x)


def silu(x: Expr) -> Expr:
    """x · sigmoid(x)."""
    x = T.Bind(x)
    return x / _one_plus_exp_minus(x)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent."""
    x = T.Bind(clamp(x, -7.90531, 7.90531))
    square = T.Bind(x * x)
    numerator = _polynomial(
        square,
        [
            -2.76076847742355e-16,
            2.00018790482477e-13,
            -8.60467152213735e-11,
            5.12229709037114e-8,
            1.48572235717979e-5,
            6.37261928875436e-4,
            4.89352455891786e-3,
        ],
    )
    denominator = _polynomial(
        square, [1.19825839466702e-6, 1.18534705686654e-4, 2.26843463243900e-3, 4.89352518554385e-3]
    )
    return x * numerator / denominator


def erf(x: Expr) -> Expr:
    """The error function."""
    x = T.Bind(clamp(x, -4, 4))
    square = T.Bind(x * x)
    numerator = _polynomial(
        square,
        [
            -2.72614225801306e-10,
            2.77068142495902e-8,
            -2.10102402082508e-6,
            -5.69250639462346e-5,
            -7.34990630326855e-4,
            -2.95459980854025e-3,
            -1.60960333262415e-2,
        ],
    )
    denominator = _polynomial(
        square,
        [-1.45660718464996e-5, -2.13374055278905e-4, -1.68282697438203e-3, -7.37332916720468e-3, -1.42647390514189e-2],
    )
    return x * numerator / denominator


def gelu(x: Expr) -> Expr:
    """x · Φ(x), with Φ(x) - 1/2 a rational function up to ±5.4, where it is 1/2 in float32."""
    x = T.Bind(x)
    limited = T.Bind(clamp(x, -5.4, 5.4))
    square = T.Bind(limited * limited)
    numerator = _polynomial(
        square,
        [
            1.1448937631275413e-10,
            -2.3101653923163212e-8,
            3.5253603982710047e-6,
            1.897090405691415e-4,
            4.621933214366436e-3,
            3.762846440076828e-2,
            3.9894169569015503e-1,
        ],
    )
    denominator = _polynomial(
        square, [6.94875925546512e-5, 1.9356649136170745e-3, 3.0091607943177223e-2, 2.6098084449768066e-1, 1.0]
    )
    return x * (_like(0.5, x) + limited * numerator / denominator)


def gelu_tanh(x: Expr) -> Expr:
    """The approximation of gelu by tanh that PyTorch calls ``approximate="tanh"``, as x · sigmoid(2 · inner)."""
    x = T.Bind(x)
    twice_inner = x * (_like(1.5957691216057308, x) + _like(0.07135481282, x) * (x * x))
    return x / _one_plus_exp_minus(T.Bind(twice_inner))
