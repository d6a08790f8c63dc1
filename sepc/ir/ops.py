"""Typed accessors over ATen nodes: `Cat.of(node).dim` instead of ``node.args[1]``.

An accessor is a frozen dataclass whose `of(node)` reads the node's arguments by the names in the operator's own schema,
so positional, keyword and defaulted arguments read alike. `Accessor.matches(node)` says whether `of` applies. Fields
that hold tensors are `fx.Node`s; spatial options are tuples with one entry per spatial dimension.
Accessors of convolutions, products, normalisations and poolings are in `sepc.ir.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from sepc.errors import VerificationError
from sepc.ir.element import ELEMENTS, Element

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten
Scalar = int | float


def is_op(node: object, *overloads: OpOverload) -> bool:
    """Whether `node` is an fx node that calls one of the ATen `overloads`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in overloads


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by schema name, defaults filled in; raises VerificationError for another node."""
    if not isinstance(node.target, OpOverload):
        raise VerificationError("Only an ATen call has named arguments", where=node.name, why=f"target {node.target}")
    values: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if not argument.kwarg_only and index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
        else:
            raise VerificationError("An ATen call lacks an argument", where=node.name, why=f"no {argument.name!r}")
    return values


def tensor(node: fx.Node) -> FakeTensor:
    """The type of a tensor-valued `node`: its FakeTensor; raises VerificationError where there is none."""
    value = node.meta.get("val")
    if not isinstance(value, FakeTensor):
        raise VerificationError(
            "A node has no tensor type", where=node.name, why=f"meta['val'] is {type(value).__name__}"
        )
    return value


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor-valued `node`."""
    return tuple(int(size) for size in tensor(node).shape)


def strides(node: fx.Node) -> tuple[int, ...]:
    """The strides of a tensor-valued `node`, in elements."""
    return tuple(int(stride) for stride in tensor(node).stride())


def dtype(node: fx.Node) -> torch.dtype:
    """The element type of a tensor-valued `node`."""
    return tensor(node).dtype


def element(node: fx.Node) -> Element:
    """The element type of a tensor-valued `node` that stages compute with; raises VerificationError for another."""
    name = str(dtype(node)).removeprefix("torch.")
    if name not in ELEMENTS:
        raise VerificationError("Stages do not compute with such numbers", where=node.name, why=f"they are {name}")
    return ELEMENTS[name]


def size_bytes(node: fx.Node) -> int:
    """Bytes of the elements of a tensor-valued `node`."""
    return tensor(node).numel() * dtype(node).itemsize


def is_constant(node: object) -> bool:
    """Whether `node` reads a tensor that belongs to the module."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def constant(module: torch.nn.Module, node: fx.Node) -> torch.Tensor:
    """The tensor that a ``get_attr`` `node` of `module` reads; raises VerificationError if it is missing."""
    value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    if not isinstance(value, torch.Tensor):
        raise VerificationError(
            "A constant is missing", where=node.name, why=f"the module has no tensor {node.target!r}"
        )
    return value


def per_dimension(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """An ATen ``int[rank]`` argument as a tuple of `rank` entries; a single entry stands for all."""
    entries = (value,) if isinstance(value, int) else tuple(value)
    return entries * rank if len(entries) == 1 else entries


class Accessor:
    """Base of the accessors: which overloads it reads, and whether a node is one of them."""

    targets: ClassVar[tuple[OpOverload, ...]]

    @classmethod
    def matches(cls, node: object) -> bool:
        """Whether `of(node)` applies."""
        return is_op(node, *cls.targets)

    @classmethod
    def position(cls, node: fx.Node) -> int:
        """The index of the node's overload in `targets`."""
        return next(index for index, target in enumerate(cls.targets) if target is node.target)

    @classmethod
    def arguments(cls, node: fx.Node) -> dict[str, Any]:
        """The named arguments of `node`; raises VerificationError if `node` is another operator."""
        if not cls.matches(node):
            raise VerificationError(f"Not a {cls.__name__} node", where=node.name, why=f"it calls {node.target}")
        return arguments(node)


@dataclass(frozen=True)
class Cat(Accessor):
    """Concatenation of `inputs` along `dim` (counted from 0)."""

    targets = (aten.cat.default,)
    inputs: tuple[fx.Node, ...]
    dim: int

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        return cls(tuple(named["tensors"]), named["dim"] % len(shape(node)))


@dataclass(frozen=True)
class Mean(Accessor):
    """The mean of `input` over `dims` (ascending, counted from 0)."""

    targets = (aten.mean.dim,)
    input: fx.Node
    dims: tuple[int, ...]
    keepdim: bool

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        rank = len(shape(named["self"]))
        dims = named["dim"] or range(rank)
        return cls(named["self"], tuple(sorted(dim % rank for dim in dims)), named["keepdim"])


@dataclass(frozen=True)
class Pad(Accessor):
    """Padding by `before[d]` and `after[d]` elements of `value` around dimension d of `input` (negative: crop)."""

    targets = (aten.constant_pad_nd.default, aten.pad.default)
    input: fx.Node
    before: tuple[int, ...]
    after: tuple[int, ...]
    value: Scalar
    mode: str

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        rank, amounts = len(shape(named["self"])), list(named["pad"])
        # ATen lists (before, after) pairs from the last dimension on.
        before = [0] * (rank - len(amounts) // 2) + amounts[0::2][::-1]
        after = [0] * (rank - len(amounts) // 2) + amounts[1::2][::-1]
        return cls(named["self"], tuple(before), tuple(after), named["value"] or 0, named.get("mode", "constant"))


@dataclass(frozen=True)
class Clamp(Accessor):
    """`input` limited to at least `minimum` and at most `maximum`; None: no limit."""

    targets = (aten.clamp.default,)
    input: fx.Node
    minimum: Scalar | None
    maximum: Scalar | None

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        return cls(named["self"], named["min"], named["max"])


@dataclass(frozen=True)
class Binary(Accessor):
    """Elementwise `input` (add, sub, mul, div) `other`, broadcast; add and sub scale `other` by `alpha` first."""

    targets = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
    kind: Literal["add", "sub", "mul", "div"]
    input: fx.Node
    other: fx.Node | Scalar
    alpha: Scalar

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        kinds: tuple[Literal["add", "sub", "mul", "div"], ...] = ("add", "sub", "mul", "div")
        kind = kinds[cls.position(node)]
        return cls(kind, named["self"], named["other"], named.get("alpha", 1))


@dataclass(frozen=True)
class Permute(Accessor):
    """`input` with dimension ``dims[d]`` moved to place d (dimensions counted from 0)."""

    targets = (aten.permute.default,)
    input: fx.Node
    dims: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        return cls(named["self"], tuple(dim % len(named["dims"]) for dim in named["dims"]))


@dataclass(frozen=True)
class Slice(Accessor):
    """Elements `start`, `start + step`, … below `end` of dimension `dim`; bounds are clipped and counted from 0."""

    targets = (aten.slice.Tensor,)
    input: fx.Node
    dim: int
    start: int
    end: int
    step: int

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        source = shape(named["self"])
        dim = named["dim"] % len(source)
        start, end, step = slice(named["start"], named["end"], named["step"]).indices(source[dim])
        return cls(named["self"], dim, start, end, step)
