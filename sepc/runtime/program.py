"""A compiled model as data: which kernels and calls of PyTorch run in which order on which memory.

Memory is a handful of blocks, each a base address: the arena, the constants, then the graph's inputs and the storages
of its results. A kernel's argument is a block and an offset, so one table of addresses is all that changes from call to
call.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sepc.runtime.host_graph import HostGraph

ARENA, CONSTANTS, FIRST_INPUT = 0, 1, 2


@dataclass(frozen=True)
class Pointer:
    """A kernel's pointer argument: `offset_bytes` into the memory block number `block`."""

    block: int
    offset_bytes: int


@dataclass(frozen=True)
class KernelCall:
    """One kernel of a segment: its symbol and arguments. `number` counts the calls of the whole model, for timing."""

    symbol: str
    arguments: tuple[Pointer, ...]
    number: int


@dataclass(frozen=True)
class TensorReference:
    """A tensor in a memory block; strides and offset in elements of `dtype`."""

    block: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class HostCall:
    """A region that PyTorch runs: its graph is called on `inputs`, and its results are copied to `results`.

    `positions` says which elements of the tuple that the graph returns are wanted; None where it returns one tensor.
    """

    graph: HostGraph
    inputs: tuple[TensorReference, ...]
    results: tuple[TensorReference, ...]
    positions: tuple[int, ...] | None
    number: int


@dataclass(frozen=True)
class Storage:
    """A block of memory for a tensor that comes with a call, or is allocated for one of its results."""

    elements: int
    dtype: torch.dtype


@dataclass
class Program:
    """What the runtime executes.

    Attributes:
        steps: segments (lists of kernel calls) and host calls, in order.
        arena_bytes: the size of block 0. constants_bytes: the size of block 1.
        inputs: the blocks of the inputs. storages: the blocks after them.
        results: one per result of the graph.
        calls: number of the first and past the last call of each region, by the region's name.
        symbols: the kernels of each region, by the region's name.
        number_of_calls: kernel calls and host calls.
    """

    steps: list[list[KernelCall] | HostCall] = field(default_factory=list)
    arena_bytes: int = 0
    constants_bytes: int = 0
    inputs: list[Storage] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    results: list[TensorReference] = field(default_factory=list)
    calls: dict[str, tuple[int, int]] = field(default_factory=dict)
    symbols: dict[str, tuple[str, ...]] = field(default_factory=dict)
    number_of_calls: int = 0

    @property
    def segments(self) -> list[list[KernelCall]]:
        """The runs of kernels between host calls."""
        return [step for step in self.steps if isinstance(step, list)]
