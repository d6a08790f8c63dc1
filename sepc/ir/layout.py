"""Where a value lies: strides and offset within the storage of the node that owns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from sepc.errors import VerificationError


@dataclass(frozen=True)
class Layout:
    """The layout of a value, kept in ``node.meta["sepc_layout"]``.

    Attributes:
        strides: in elements, one per logical dimension.
        offset: elements from the start of the storage.
        base: the node that owns the storage: a placeholder, a constant or a region.
    """

    strides: tuple[int, ...]
    offset: int
    base: fx.Node

    def __str__(self) -> str:
        """As the printed graph has it."""
        return f"{self.strides} in {self.base}" + (f" from {self.offset}" if self.offset else "")


def layout(node: fx.Node) -> Layout:
    """The layout of `node`; raises VerificationError where plan-layout has not been there."""
    found = node.meta.get("sepc_layout")
    if not isinstance(found, Layout):
        raise VerificationError("A value has no layout", where=node.name, why="meta['sepc_layout'] is missing")
    return found


def same_strides(shape: Sequence[int], left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether both address the same elements; strides of dimensions of size 1, or of an empty tensor, do not matter."""
    if 0 in shape:
        return True
    return all(size == 1 or a == b for size, a, b in zip(shape, left, right, strict=True))


def storage_elements(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements that a tensor spans in its storage, from the first to the last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
