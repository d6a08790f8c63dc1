"""Typed accessors over the ATen nodes that reduce: convolutions, products, normalisations and poolings.

They are what kernels are built around (`sepc.ir.anchors`). How accessors work is told in `sepc.ir.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import fx

from sepc.ir.ops import Accessor, aten, dtype, per_dimension, shape


@dataclass(frozen=True)
class Conv(Accessor):
    """A convolution of `input` [N, I, spatial...] with `weight` [O, I / groups, kernel...] and `bias` [O]."""

    targets = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        rank = cls.position(node) + 1
        stride, padding, dilation = (per_dimension(named[name], rank) for name in ("stride", "padding", "dilation"))
        return cls(named["input"], named["weight"], named["bias"], stride, padding, dilation, named["groups"])

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's spatial size."""
        return shape(self.weight)[2:]

    @property
    def in_channels(self) -> int:
        """Input channels, over all groups."""
        return shape(self.weight)[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Output channels, over all groups."""
        return shape(self.weight)[0]

    @property
    def is_depthwise(self) -> bool:
        """Whether each group has one input channel (a channel multiplier is allowed)."""
        return self.groups > 1 and shape(self.weight)[1] == 1

    @property
    def is_pointwise(self) -> bool:
        """Whether every kernel size is 1 and there is one group."""
        return self.groups == 1 and all(size == 1 for size in self.kernel)


@dataclass(frozen=True)
class ConvTranspose(Accessor):
    """A transposed convolution of `input` [N, I, spatial...] with `weight` [I, O / groups, kernel...], `bias` [O]."""

    targets = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        return cls.read(cls.arguments(node))

    @classmethod
    def read(cls, named: Mapping[str, Any]) -> Self:
        """From the named arguments of any operator that spells them alike."""
        rank = len(shape(named["weight"])) - 2
        stride, padding, output_padding, dilation = (
            per_dimension(named[name], rank) for name in ("stride", "padding", "output_padding", "dilation")
        )
        operands = (named["input"], named["weight"], named["bias"])
        return cls(*operands, stride, padding, output_padding, dilation, named["groups"])

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's spatial size."""
        return shape(self.weight)[2:]

    @property
    def in_channels(self) -> int:
        """Input channels, over all groups."""
        return shape(self.weight)[0]

    @property
    def out_channels(self) -> int:
        """Output channels, over all groups."""
        return shape(self.weight)[1] * self.groups


@dataclass(frozen=True)
class Linear(Accessor):
    """A product of `input` [..., I] with `weight` [O, I], plus `bias` [O]."""

    targets = (aten.linear.default,)
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        return cls(named["input"], named["weight"], named["bias"])


@dataclass(frozen=True)
class BatchNorm(Accessor):
    """Inference batch normalisation of `input` [N, C, ...] by running statistics [C].

    Reads ``aten.batch_norm`` (one output, the spelling after canonicalize) and the two-output forms before it.
    """

    targets = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
    input: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    running_mean: fx.Node
    running_var: fx.Node
    eps: float

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        names = ("input", "weight", "bias", "running_mean", "running_var", "eps")
        return cls(*(named[name] for name in names))


@dataclass(frozen=True)
class LayerNorm(Accessor):
    """Layer normalisation of `input` over its last ``len(normalized_shape)`` dimensions."""

    targets = (aten.layer_norm.default,)
    input: fx.Node
    normalized_shape: tuple[int, ...]
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        return cls(named["input"], tuple(named["normalized_shape"]), named["weight"], named["bias"], named["eps"])


@dataclass(frozen=True)
class RMSNorm(Accessor):
    """Division of `input` by the root of its mean square over its last ``len(normalized_shape)`` dimensions."""

    targets = (aten.rms_norm.default,)
    input: fx.Node
    normalized_shape: tuple[int, ...]
    weight: fx.Node | None
    eps: float

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        eps = torch.finfo(dtype(node)).eps if named["eps"] is None else named["eps"]
        return cls(named["input"], tuple(named["normalized_shape"]), named["weight"], eps)


@dataclass(frozen=True)
class GroupNorm(Accessor):
    """Normalisation of `groups` groups of neighbouring channels of `input` [N, C, ...], each over all its pixels.

    An instance normalisation has a group per channel; where it has statistics, it reads or updates those.
    """

    targets = (aten.group_norm.default, aten.instance_norm.default)
    input: fx.Node
    groups: int
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    has_statistics: bool

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        groups = named.get("num_groups", shape(node)[1])
        has_statistics = named.get("running_mean") is not None
        return cls(named["input"], groups, named["weight"], named["bias"], named["eps"], has_statistics)


@dataclass(frozen=True)
class Softmax(Accessor):
    """Softmax of `input` over its dimension `dim`, which is not negative."""

    targets = (aten.softmax.int, aten._softmax.default)
    input: fx.Node
    dim: int

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        return cls(named["self"], named["dim"] % max(1, len(shape(node))))


@dataclass(frozen=True)
class Product(Accessor):
    """A matrix product of two tensors, [..., M, K] and [..., K, N], whose leading dimensions broadcast."""

    targets = (aten.matmul.default, aten.bmm.default, aten.mm.default)
    left: fx.Node
    right: fx.Node

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        return cls(named["self"], named["other" if "other" in named else "mat2"])


PoolKind = Literal["max", "avg", "adaptive_avg"]


@dataclass(frozen=True)
class Pool(Accessor):
    """Pooling over the last one to three dimensions of `input`; adaptive pooling sets `output_size`, other `kernel`."""

    targets = (
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
    )
    input: fx.Node
    kind: PoolKind
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None
    output_size: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Read `node`; raises VerificationError if it calls another operator."""
        named = cls.arguments(node)
        kinds: tuple[PoolKind, ...] = ("max", "avg", "adaptive_avg")
        rank, kind = cls.position(node) % 3 + 1, kinds[cls.position(node) // 3]
        if kind == "adaptive_avg":
            sizes = per_dimension(named["output_size"], rank)
            return cls(named["self"], kind, (), (), (), (), False, True, None, sizes)
        kernel = per_dimension(named["kernel_size"], rank)
        return cls(
            input=named["self"],
            kind=kind,
            kernel=kernel,
            # An empty stride means: as large as the kernel.
            stride=per_dimension(named["stride"] or kernel, rank),
            padding=per_dimension(named["padding"], rank),
            dilation=per_dimension(named.get("dilation", 1), rank),
            ceil_mode=named["ceil_mode"],
            count_include_pad=named.get("count_include_pad", True),
            divisor_override=named.get("divisor_override"),
            output_size=(),
        )
