"""What must hold of a program that comes from a file, so that running it stays inside of its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from sepc.runtime.program import HostCall, KernelCall, Program, Storage, TensorReference
from sepc.runtime.signature import TensorLeaf
from sepc.runtime.specialization import Description

# One tensor of 2**48 bytes is more than any host has; beyond, sums of sizes might not be what they seem.
_MOST_BYTES = 1 << 48
_MOST_THREADS = 1 << 12


def require_sound(description: Description, program: Program, constants_bytes: int) -> None:
    """Nothing, if `program` fits its description and its `constants_bytes` of constants; else raises ValueError."""
    if program.constants_bytes != constants_bytes:
        raise ValueError(f"the program wants {program.constants_bytes} bytes of constants, and has {constants_bytes}")
    if not 1 <= description.threads <= _MOST_THREADS:
        raise ValueError(f"a program is for {description.threads} threads")
    storages = [*program.inputs, *program.storages]
    sizes = [program.arena_bytes, constants_bytes, *(one.elements * one.dtype.itemsize for one in storages)]
    if not all(0 <= size < _MOST_BYTES for size in sizes):
        raise ValueError("a block of memory has an impossible size")
    for tensor in _tensors(program):
        _require_inside(tensor, sizes)
    pointers = (pointer for segment in program.segments for call in segment for pointer in call.arguments)
    # An empty tensor may lie at the very end.
    if not all(0 <= one.block < len(sizes) and 0 <= one.offset_bytes <= sizes[one.block] for one in pointers):
        raise ValueError("an argument of a kernel lies outside of its block")
    _require_calls(program)
    _require_structures(description, program)


def _tensors(program: Program) -> Iterator[TensorReference]:
    yield from program.results
    for step in program.steps:
        if isinstance(step, HostCall):
            yield from (*step.inputs, *step.results)


def _require_inside(tensor: TensorReference, sizes: Sequence[int]) -> None:
    if (
        len(tensor.shape) != len(tensor.strides)
        or min((tensor.offset, tensor.block, *tensor.shape, *tensor.strides)) < 0
    ):
        raise ValueError("a tensor has an impossible shape")
    pairs = zip(tensor.shape, tensor.strides, strict=True)
    last = 0 if 0 in tensor.shape else 1 + sum((size - 1) * stride for size, stride in pairs)
    if tensor.block >= len(sizes) or (tensor.offset + last) * tensor.dtype.itemsize > sizes[tensor.block]:
        raise ValueError("a tensor lies outside of its block")


def _require_calls(program: Program) -> None:
    """Calls are numbered one after the other, and regions are runs of them."""
    calls: list[KernelCall | HostCall] = []
    for step in program.steps:
        if isinstance(step, HostCall):
            if step.graph.inputs != len(step.inputs):
                raise ValueError("a graph is called with another number of inputs")
            step.graph.require_earlier_values()
            calls.append(step)
        elif step:
            calls.extend(step)
        else:
            raise ValueError("a segment has no kernel")
    if program.number_of_calls != len(calls) or any(call.number != place for place, call in enumerate(calls)):
        raise ValueError("calls are not numbered in their order")
    if not all(0 <= first <= end <= len(calls) for first, end in program.calls.values()):
        raise ValueError("a region has calls that there are not")


def _require_structures(description: Description, program: Program) -> None:
    """The signature, the results and the reports are of this program."""
    signature = description.signature
    hash(signature.key)  # It is to be looked up by that.
    leaves = [leaf for leaf in signature.leaves if isinstance(leaf, TensorLeaf)]
    for structure in (signature, description.results):
        if structure.spec.num_leaves != len(structure.leaves):
            raise ValueError("a structure has another number of leaves")
    if not all(0 <= index < len(leaves) for index in description.order):
        raise ValueError("an input is none of the arguments")
    taken = [Storage(math.prod(leaves[index].shape), leaves[index].dtype) for index in description.order]
    if taken != program.inputs:
        raise ValueError("the inputs are not those of the signature")
    places = (place for place in description.results.leaves if isinstance(place, int))
    if not all(0 <= place < len(program.results) for place in places):
        raise ValueError("a result is none of the program's")
    if [one.name for one in description.regions] != list(program.calls):
        raise ValueError("the regions are not those of the program")
