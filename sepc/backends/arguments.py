"""What the pointers of a kernel are, collected while it is lowered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from sepc.backends.stages.kernel import Parameter
from sepc.ir import ops
from sepc.ir.layout import storage_elements
from sepc.ir.problem import Strides
from sepc.ir.region import placeholders

FloatArray = NDArray[np.float32]

FLOAT_BYTES = 4
LINE_ELEMENTS = 16
# Between the scratch of two threads, a page and a bit: with less, prefetching by one disturbs the other. Measured on 2
# Zen 5 cores, 1×1 16→96, depthwise stride 2, 1×1 96→24 at 112²: 194 µs without, 158 µs with.
THREAD_GAP_ELEMENTS = 1024 + 3 * LINE_ELEMENTS


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
    """Collects the pointer parameters of a kernel."""

    def __init__(self, region: fx.GraphModule, lanes: int) -> None:
        self.lanes = lanes
        self._region = region
        self._index = {node: index for index, node in enumerate(placeholders(region))}
        self.parameters: list[Parameter] = []
        self.values: list[Argument] = []

    def constant(self, kind: str, array: FloatArray) -> str:
        """Add an array of constants of that kind; returns its parameter name."""
        self.parameters.append(Parameter(f"{kind}_{len(self.values)}", array.size))
        self.values.append(np.ascontiguousarray(array))
        return self.parameters[-1].name

    def tensor(self, node: fx.Node, strides: Strides, extents: Sequence[int]) -> str:
        """Add a tensor that the region reads, an input or a constant; returns its parameter name."""
        if node.op == "get_attr":
            return self.constant("constant", self.array(node).ravel())
        self.parameters.append(Parameter(f"in_{len(self.values)}", storage_elements(extents, strides)))
        self.values.append(self._index[node])
        return self.parameters[-1].name

    def result(self, extents: Sequence[int], strides: Strides, position: int = 0) -> str:
        """Add the pointer to a result of the region, if there is one; returns its parameter name, else nothing."""
        if not strides:
            return ""
        self.parameters.append(Parameter(f"out_{position}", storage_elements(extents, strides)))
        self.values.append(Result(position))
        return self.parameters[-1].name

    def scratch(self, elements_per_thread: int, shared_elements: int = 0) -> str:
        """Add a pointer to shared memory, and behind it memory of each thread's own, one piece after the other; returns
        its parameter name. All kernels of a region find the same memory there.
        """
        # How many threads there are is known at the call only; the size of the buffer does not matter to the code.
        self.parameters.append(Parameter("scratch", shared_elements + elements_per_thread))
        self.values.append(Scratch(elements_per_thread * FLOAT_BYTES, shared_elements * FLOAT_BYTES))
        return "scratch"

    def array(self, node: fx.Node) -> FloatArray:
        """The values of a constant of the region."""
        return ops.constant(self._region, node).detach().contiguous().numpy()
