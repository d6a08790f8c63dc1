"""What converters of ATen operators build with: tensor expressions, constants, reads with broadcasting, conversions."""

from __future__ import annotations

import math as python_math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages import math as vector_math

Expr = Any  # a tirx expression of one lane
Tensor = Any  # a te.Tensor
Converter = Callable[..., Any]

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
    torch.float16: "float16",
    torch.bfloat16: "uint16",
}
# Kernels only convert these, and copy them. TVM's own bfloat16 converts the bits as if they were an integer.
HALVES = (torch.float16, torch.bfloat16)
_BFLOAT16 = DTYPES[torch.bfloat16]

# An expression with more operators than this is stored to memory instead of being repeated in each of its readers.
_MAX_INLINE_WEIGHT = 48


class UnsupportedError(Exception):
    """An allowlisted operator with arguments that the converter does not handle; the message is the reason."""


class Emitter:
    """What converters build with: constants, element-wise results, reductions.

    Attributes:
        out: the result that PyTorch inferred for the node at hand: a FakeTensor or a tuple of them.
        constants: arrays that expressions read, by their placeholder.
        weights: number of operators in the expression of each tensor, by name, inlined sources included.
        heavy: names of tensors whose elements cost a transcendental function: never computed twice.
    """

    def __init__(self) -> None:
        self.out: Any = None
        self.constants: dict[Tensor, np.ndarray] = {}
        self.weights: dict[str, int] = {}
        self.heavy: set[str] = set()
        self._count = 0
        self._saw_heavy = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        first = self.out[0] if isinstance(self.out, list | tuple) else self.out
        return tuple(int(extent) for extent in first.shape)

    @property
    def dtype(self) -> str:
        """TVM's name of the dtype of the (first) result."""
        return DTYPES[(self.out[0] if isinstance(self.out, list | tuple) else self.out).dtype]

    def constant(self, array: np.ndarray) -> Tensor:
        """`array` as a tensor; one element becomes an immediate value."""
        if array.size == 1:
            value = tirx.const(array.item(), str(array.dtype))
            return self.compute(array.shape, lambda *_: value)
        placeholder = te.placeholder(array.shape, str(array.dtype), name=f"constant_{len(self.constants)}")
        self.constants[placeholder] = np.ascontiguousarray(array)
        return placeholder

    def compute(
        self, shape: Sequence[int], element: Callable[..., Expr], sources: Sequence[Tensor] = (), stored: bool = False
    ) -> Tensor:
        """The tensor of `shape` with `element(*indices)` at each position.

        Args:
            shape: the result's.
            element: from index expressions to the element.
            sources: the tensors that `element` reads, once for each time it reads them.
            stored: the result is never inlined into its readers.
        """
        name = f"value_{self.unique()}"
        self._saw_heavy = False
        result = te.compute(tuple(shape), element, name=name)
        self.weights[name] = 2 + sum(self.inline_weight(source) for source in sources)
        if self._saw_heavy:
            self.heavy.add(name)
            self.weights[name] += _MAX_INLINE_WEIGHT // 3
        if stored:
            self.weights[name] = _MAX_INLINE_WEIGHT + 1
        return result

    def unique(self) -> int:
        """A number not returned before, for names."""
        self._count += 1
        return self._count

    def inline_weight(self, tensor: Tensor) -> int:
        """Operators that a reader of `tensor` repeats: those of its expression if it may be inlined, else one load."""
        weight = self.weights.get(tensor.op.name, 1)
        return weight if weight <= _MAX_INLINE_WEIGHT else 1

    def may_inline(self, name: str) -> bool:
        """Whether the expression of tensor `name` is small enough to be repeated in its readers."""
        return self.weights.get(name, _MAX_INLINE_WEIGHT + 1) <= _MAX_INLINE_WEIGHT

    def vectorisable(self, function: Callable[[Expr], Expr], value: Expr) -> Expr:
        """`function` of `sepc.backends.stages.math` as one expression: its named values become nested lets."""
        self._saw_heavy = True
        with IRBuilder() as builder, T.prim_func():
            T.func_name("scratch")
            result = function(value)
            T.evaluate(tirx.const(0, "int32"))  # a body is never empty
        body = builder.get().body
        for statement in reversed(list(getattr(body, "seq", [body]))):
            if isinstance(statement, tirx.Bind):
                result = tirx.Let(statement.var, statement.value, result)
        return result

    def exp(self, value: Expr) -> Expr:
        """e to the power of `value`, exactly 0 and infinity outside the range of normal numbers."""
        return let(value, lambda x: _exp(x, self.vectorisable(vector_math.exp, x)))

    def library(self, function: Callable[..., Expr], *values: Expr) -> Expr:
        """A function of libm: one call per element."""
        self._saw_heavy = True
        return function(*values)


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """`body` of a name bound to `value`, so that it is evaluated once."""
    variable = tirx.Var("x", str(value.ty.dtype))
    return tirx.Let(variable, value, body(variable))


def number(value: float | bool, dtype: str) -> Expr:
    """A constant of `dtype`."""
    return tirx.const(bool(value) if dtype == "bool" else value, dtype)


def cast(value: Expr, dtype: str) -> Expr:
    """`value` as PyTorch converts it to `dtype`: to bool means "is not zero"."""
    source = str(value.ty.dtype)
    if source == dtype:
        return value
    if source == _BFLOAT16:
        return cast(_from_bfloat16(value), dtype)
    if dtype == _BFLOAT16:
        return _to_bfloat16(cast(value, "float32"))
    return tirx.NE(value, number(0, source)) if dtype == "bool" else tirx.Cast(dtype, value)


def _from_bfloat16(bits: Expr) -> Expr:
    """The float32 whose upper half is `bits`."""
    return tirx.reinterpret("float32", tirx.Cast("uint32", bits) << number(16, "uint32"))


def _to_bfloat16(value: Expr) -> Expr:
    """The upper half of a float32 that is rounded to the nearest one with an even last bit; NaN stays NaN."""

    def rounded(bits: Expr) -> Expr:
        odd = (bits >> number(16, "uint32")) & number(1, "uint32")
        upper = (bits + number(0x7FFF, "uint32") + odd) >> number(16, "uint32")
        is_nan = (bits & number(0x7FFFFFFF, "uint32")) > number(0x7F800000, "uint32")
        return tirx.Cast(_BFLOAT16, tirx.Select(is_nan, number(0x7FC0, "uint32"), upper))

    return let(tirx.reinterpret("uint32", value), rounded)


def _exp(x: Expr, saturated: Expr) -> Expr:
    # Not `x > limit ? … : saturated`: NaN must take the polynomial's branch, which propagates it.
    bounded = tirx.Select(x > number(88.72284, "float32"), number(python_math.inf, "float32"), saturated)
    return tirx.Select(x < number(-87.33654, "float32"), number(0, "float32"), bounded)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Static shape of a `te.Tensor`."""
    return tuple(int(extent) for extent in tensor.shape)


def dtype_of(tensor: Tensor) -> str:
    """Dtype name of a `te.Tensor`."""
    return str(tensor.dtype)


def broadcast_read(tensor: Tensor, indices: Sequence[Expr]) -> Expr:
    """The element of `tensor` that broadcasts to position `indices` of a result."""
    shape = shape_of(tensor)
    own = indices[len(indices) - len(shape) :]
    return tensor(*[tirx.const(0, "int32") if extent == 1 else index for extent, index in zip(shape, own, strict=True)])


def like(value: float, x: Expr) -> Expr:
    """`value` in the dtype of `x`."""
    return number(value, str(x.ty.dtype))


def is_float(x: Expr) -> bool:
    """Whether `x` is a floating-point expression."""
    return str(x.ty.dtype).startswith("float")
