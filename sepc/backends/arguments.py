"""What the pointers of a kernel are, collected while it is lowered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from sepc.backends.stages.kernel import Parameter
from sepc.backends.stages.vector import FloatArray
from sepc.ir import ops
from sepc.ir.element import FLOAT32, Element
from sepc.ir.layout import storage_elements
from sepc.ir.problem import Strides
from sepc.ir.region import placeholders, returned

LINE_BYTES = 64
# Between the scratch of two threads, a page and a bit: with less, prefetching by one disturbs the other. Measured on 2
# Zen 5 cores, 1×1 16→96, depthwise stride 2, 1×1 96→24 at 112²: 194 µs without, 158 µs with.
THREAD_GAP_BYTES = 4096 + 3 * LINE_BYTES
THREAD_GAP_ELEMENTS = THREAD_GAP_BYTES // FLOAT32.size_bytes


@dataclass(frozen=True)
class Scratch:
    """Memory that the kernels of a region need while they run: for each thread, and in front of that for all."""

    bytes_per_thread: int
    shared_bytes: int = 0


@dataclass(frozen=True)
class Result:
    """What a kernel writes: the region's result, or the means of it over each row."""

    position: int = 0


# What a kernel's pointer is: a placeholder's index, an array of constants, scratch, or a result.
Argument = int | FloatArray | Scratch | Result


class Arguments:
    """Collects the pointer parameters of a kernel whose vectors have the width of `lanes` float32."""

    def __init__(self, region: fx.GraphModule, lanes: int) -> None:
        self._lanes = lanes
        self._region = region
        self._index = {node: index for index, node in enumerate(placeholders(region))}
        self.parameters: list[Parameter] = []
        self.values: list[Argument] = []

    def lanes(self, element: Element) -> int:
        """Numbers of that type in a vector."""
        return self._lanes * element.per_float32

    def constant(self, kind: str, array: FloatArray) -> str:
        """Add an array of constants of that kind; returns its parameter name."""
        self.parameters.append(Parameter(f"{kind}_{len(self.values)}", array.size, array.dtype.name))
        self.values.append(np.ascontiguousarray(array))
        return self.parameters[-1].name

    def tensor(self, node: fx.Node, strides: Strides, extents: Sequence[int]) -> str:
        """Add a tensor that the region reads, an input or a constant; returns its parameter name."""
        if node.op == "get_attr":
            return self.constant("constant", self.array(node).ravel())
        self.parameters.append(
            Parameter(f"in_{len(self.values)}", storage_elements(extents, strides), ops.element(node).name)
        )
        self.values.append(self._index[node])
        return self.parameters[-1].name

    def result(self, extents: Sequence[int], strides: Strides, position: int = 0) -> str:
        """Add the pointer to a result of the region, if there is one; returns its parameter name, else nothing."""
        if not strides:
            return ""
        element = ops.element(returned(self._region)[position])
        self.parameters.append(Parameter(f"out_{position}", storage_elements(extents, strides), element.name))
        self.values.append(Result(position))
        return self.parameters[-1].name

    def scratch(self, bytes_per_thread: int, shared_bytes: int = 0, element: Element = FLOAT32) -> str:
        """Add a pointer to shared memory, and behind it memory of each thread's own, one piece after the other; returns
        its parameter name. All kernels of a region find the same memory there, and so do pointers of several types.
        """
        # How many threads there are is known at the call only; the size of the buffer does not matter to the code.
        size = (shared_bytes + bytes_per_thread) // element.size_bytes
        parameter = Parameter(f"scratch_{element.name}", size, element.name)
        if parameter not in self.parameters:
            self.parameters.append(parameter)
            self.values.append(Scratch(bytes_per_thread, shared_bytes))
        return parameter.name

    def array(self, node: fx.Node) -> FloatArray:
        """The values of a constant of the region."""
        return ops.constant(self._region, node).detach().contiguous().numpy()
