"""Vectors of sums in registers; long sums of float16 are made of blocks, each of which is added to a float32.

    s = Σ_b float32(Σ_{k in block b} x_k · w_k)        the inner sums in float16, of `Element.longest_sum` terms at most

The float32 sums are used once per block only: LLVM keeps them on the stack while a block is added up, so that they take
no registers from the innermost loop.
"""

from __future__ import annotations

from sepc.backends.stages.vector import Accumulator, Expr, cast, constant
from sepc.ir.convolution import Convolution
from sepc.ir.element import FLOAT32


class Sum:
    """A vector of sums of products, each `convolution.taps · convolution.group_in` terms long."""

    def __init__(self, convolution: Convolution, lanes: int) -> None:
        self.lanes = lanes
        self._element = convolution.element.name
        self._block = Accumulator(lanes, self._element)
        self._total = Accumulator(lanes, FLOAT32.name) if convolution.sums_in_blocks else None

    def start(self, initial: Expr | None) -> None:
        """Begin with `initial`, or with 0."""
        nothing = constant(0, self.lanes, self._element)
        if self._total is not None:
            total = constant(0, self.lanes) if initial is None else cast(initial, FLOAT32.name)
            self._total.set(total)
        self._block.set(nothing if initial is None or self._total is not None else initial)

    def add(self, left: Expr, right: Expr) -> None:
        """Add a product."""
        self._block.set(self._block.value + left * right)

    def end_block(self) -> None:
        """Add what the block has come to, where there are blocks."""
        if self._total is not None:
            self._total.set(self._total.value + cast(self._block.value, FLOAT32.name))
            self._block.set(constant(0, self.lanes, self._element))

    @property
    def value(self) -> Expr:
        """The sums, all blocks being ended: in float32 where there are blocks."""
        return self._block.value if self._total is None else self._total.value
