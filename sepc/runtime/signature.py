"""How a compiled model is called: the structures of its arguments and of its result, and what is fixed in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from sepc.errors import InputError

CPU: Final = "cpu"


@dataclass(frozen=True)
class Constant:
    """A leaf of the user's arguments or result that is no tensor of the graph: its value at capture."""

    value: object


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor among the arguments. Its strides are those of a contiguous tensor, or else of a channels-last one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool


@dataclass(frozen=True)
class Signature:
    """The calls that a specialisation is for: the pytree of ``(args, kwargs)`` and each leaf of it."""

    spec: pytree.TreeSpec
    leaves: tuple[TensorLeaf | Constant, ...]

    @staticmethod
    def of(spec: pytree.TreeSpec, leaves: Sequence[Any]) -> Signature:
        """The signature of a call with these leaves, whose tensors are as `dense` leaves them."""
        described = (
            TensorLeaf(tuple(leaf.shape), leaf.dtype, leaf.is_contiguous())
            if isinstance(leaf, torch.Tensor)
            else Constant(leaf)
            for leaf in leaves
        )
        return Signature(spec, tuple(described))

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal to `call_key` of a call that fits."""
        parts = (
            (leaf.shape, leaf.dtype, CPU, leaf.contiguous)
            if isinstance(leaf, TensorLeaf)
            else (type(leaf.value), leaf.value)
            for leaf in self.leaves
        )
        return (self.spec, *parts)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the tensors."""
        return tuple(leaf.shape for leaf in self.leaves if isinstance(leaf, TensorLeaf))

    def __str__(self) -> str:
        """The shapes, and what else tells two signatures apart."""
        parts = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorLeaf):
                dtype = str(leaf.dtype).removeprefix("torch.")
                parts.append(f"{dtype}{list(leaf.shape)}{'' if leaf.contiguous else ' channels-last'}")
            else:
                parts.append(repr(leaf.value))
        return ", ".join(parts)


@dataclass(frozen=True)
class TensorCall:
    """The calls with so many tensors and nothing else, each of which is taken as it is.

    Attributes:
        threads: that the call uses. tensors: shape, strides and type of each. device: where they are.
    """

    threads: int
    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    device: torch.device

    @staticmethod
    def of(threads: int, args: Sequence[Any], leaves: Sequence[Any]) -> TensorCall | None:
        """Calls like that with `args`, of which `flatten` and `dense` made `leaves`; None if those are others."""
        same = len(args) == len(leaves) and all(arg is leaf for arg, leaf in zip(args, leaves, strict=True))
        if not args or not same or any(type(arg) is not torch.Tensor or arg.dtype.is_complex for arg in args):
            return None
        found = TensorCall(threads, tuple((one.shape, one.stride(), one.dtype) for one in args), args[0].device)
        return found if found.fits(threads, args) else None

    def fits(self, threads: int, args: Sequence[Any]) -> bool:
        """Whether a call with `args` is one of them.

        Says so of most calls of a model at a fraction of the time of `flatten`, `dense` and `call_key`.
        """
        if threads != self.threads or len(args) != len(self.tensors):
            return False
        for arg, (shape, strides, dtype) in zip(args, self.tensors, strict=True):
            if type(arg) is not torch.Tensor or arg.dtype is not dtype or arg.shape != shape:
                return False
            # Sparse tensors have no strides; what is negated by PyTorch when it is read has other values in memory.
            if arg.layout is not torch.strided or arg.stride() != strides or arg.requires_grad or arg.is_neg():
                return False
            if arg.device != self.device:
                return False
        return True


def flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's arguments and their structure, with keywords in one order, whatever that of the call."""
    # Most calls are such ones, and PyTorch's walk through nested arguments takes as long as all else together.
    if not kwargs and all(isinstance(argument, torch.Tensor) for argument in args):
        return list(args), _spec_of_tensors(len(args))
    return pytree.tree_flatten((args, dict(sorted(kwargs.items())) if kwargs else {}))


@lru_cache(maxsize=64)
def _spec_of_tensors(count: int) -> pytree.TreeSpec:
    return pytree.tree_flatten(((0,) * count, {}))[1]


def call_key(spec: pytree.TreeSpec, leaves: Sequence[Any], device: str = CPU) -> tuple[Any, ...]:
    """What a specialisation depends on: of a tensor type and strides, of another value itself and type (1 is not 1.0).

    `leaves` as `dense` leaves them. Not all of what a caller passes can be hashed. A tensor of the kind of `device`
    that runs the model counts as one of the CPU, which it is captured with.
    """
    return (spec, *(_key(leaf, device) for leaf in leaves))


def _key(leaf: Any, device: str) -> Any:
    if isinstance(leaf, torch.Tensor):
        kind = leaf.device.type
        return leaf.shape, leaf.dtype, CPU if kind == device else kind, leaf.is_contiguous()
    return type(leaf), leaf


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, without its gradient, if it is contiguous or channels-last, else a contiguous copy.

    Its memory holds its values: PyTorch may put off negating and conjugating them. Raises InputError for one without
    strides, as sparse ones are.
    """
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        raise InputError(f"An input is {kind}", where=f"of shape {tuple(tensor.shape)}", fix="pass x.to_dense()")
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.is_neg() or tensor.is_conj():
        tensor = tensor.resolve_neg().resolve_conj()
    return tensor if tensor.is_contiguous() or _is_channels_last(tensor) else tensor.contiguous()


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is dense with dimension 1 innermost: [N, C, W], [N, C, H, W] or [N, C, D, H, W]."""
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() in (3, 5) and tensor.movedim(1, -1).is_contiguous()


@dataclass(frozen=True)
class Results:
    """The user's result: its pytree, and per leaf the index into the flat results of the graph, or a fixed value."""

    spec: pytree.TreeSpec
    leaves: tuple[int | Constant, ...]

    def unflatten(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The user's result from the graph's flat `outputs`."""
        if self._is_one_tensor:
            return outputs[0]
        leaves = [place.value if isinstance(place, Constant) else outputs[place] for place in self.leaves]
        if self.spec.is_leaf():
            return leaves[0]
        return pytree.tree_unflatten(leaves, self.spec)

    @cached_property
    def _is_one_tensor(self) -> bool:
        """Whether it is the graph's first output, as for most models."""
        return self.spec.is_leaf() and self.leaves == (0,)
