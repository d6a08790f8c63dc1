"""Transcendental functions on vectors, as polynomials: TVM's own become one scalar library call per lane.

Each takes and returns a float32 expression of any number of lanes. Relative errors against float64, over the range
where the result is a normal number: exp 8e-8, sigmoid 1e-7, silu 1.2e-7; absolute errors: tanh 2.4e-7, erf 2.6e-7,
gelu 8e-7. NaN propagates: every minimum and maximum has its constant first, which returns the other operand where that
is NaN.

Sources: exp follows the Cephes library (range reduction by ln 2 in two parts, minimax polynomial of degree 5); tanh and
erf are the rational minimax approximations that Eigen uses for float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.vector import Expr, constant, lanes_of


def _like(value: float, x: Expr) -> Expr:
    return constant(value, lanes_of(x))


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


def exp(x: Expr) -> Expr:
    """e to the power of `x`; saturates below -87.3 and above 88.4."""
    lanes = lanes_of(x)
    suffix = "" if lanes == 1 else f"x{lanes}"
    x = T.Bind(clamp(x, -87.33654, 88.37626))
    exponent = T.Bind(tirx.floor(x * _like(1.44269504, x) + _like(0.5, x)))
    rest = T.Bind(x - exponent * _like(0.693359375, x) - exponent * _like(-2.12194440e-4, x))
    series = _polynomial(
        rest, [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1]
    )
    mantissa = series * rest * rest + rest + _like(1, x)
    biased = tirx.Cast("int32" + suffix, exponent) + constant(127, lanes, "int32")
    return mantissa * tirx.reinterpret("float32" + suffix, tirx.shift_left(biased, constant(23, lanes, "int32")))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    return _like(1, x) / (_like(1, x) + exp(_like(0, x) - x))


def silu(x: Expr) -> Expr:
    """x · sigmoid(x)."""
    x = T.Bind(x)
    return x / (_like(1, x) + exp(_like(0, x) - x))


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
    """x · Φ(x), by the error function."""
    x = T.Bind(x)
    return x * _like(0.5, x) * (_like(1, x) + erf(x * _like(0.70710678118, x)))


def gelu_tanh(x: Expr) -> Expr:
    """The approximation of gelu by tanh that PyTorch calls ``approximate="tanh"``."""
    x = T.Bind(x)
    inner = _like(0.7978845608, x) * (x + _like(0.044715, x) * x * x * x)
    return _like(0.5, x) * x * (_like(1, x) + tanh(inner))
