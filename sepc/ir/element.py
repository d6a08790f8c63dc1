"""The types of the numbers that stages compute with, and how long sums in them may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, Self

ElementName = Literal["float32", "float16"]


@dataclass(frozen=True)
class Element:
    """A type of numbers.

    Attributes:
        name: as PyTorch, TVM and numpy call it. size_bytes: of one.
        longest_sum: how many products may be added one to the next in this type; longer sums are made of such blocks,
            which are added in float32. 0: any number.
    """

    name: ElementName
    size_bytes: int
    longest_sum: int = 0

    @property
    def per_float32(self) -> int:
        """How many take the room of a float32."""
        return FLOAT32.size_bytes // self.size_bytes


LONGEST_SUM: Final = 256
"""Products that are added in float16.

A sum of n products of random signs has an error of about 2⁻¹² · √(n / 2) of its own size: 0.3 % for 256, where its
rounding to float16 takes 0.03 %. Shorter blocks cost time: a vector's block is added to its sum in some nine
instructions.
"""
FLOAT32: Final = Element("float32", 4)
FLOAT16: Final = Element("float16", 2, LONGEST_SUM)
ELEMENTS: Final[dict[str, Element]] = {one.name: one for one in (FLOAT32, FLOAT16)}


class Typed:
    """What every stage has: the type of the numbers that it reads and writes."""

    element: Element

    def of(self, element: Element) -> Self:
        """The same of numbers of another type."""
        return replace(self, element=element)  # type: ignore[type-var]  # Every one of them is a dataclass.
