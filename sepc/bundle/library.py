"""A compiled model as a shared library with its weights, for TVM's runtime and `sepc.load`; and how it is called."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sepc.bundle.bundle import Bundle, render
from sepc.c_compiler import cross_compiler, run_compiler
from sepc.errors import ArtifactError
from sepc.ir.layout import same_strides
from sepc.ir.problem import contiguous_strides
from sepc.runtime import exported
from sepc.runtime.exported import Input, Interface, Output
from sepc.runtime.program import FIRST_INPUT, Program, TensorReference
from sepc.runtime.records import Value
from sepc.runtime.signature import Constant, TensorLeaf
from sepc.runtime.specialization import Specialization
from sepc.target import Target


def link_library(bundle: Bundle, packed: bytes, target: Target) -> bytes:
    """The shared library of a bundle that is `shared`, with the functions of TVM's runtime in the object file `packed`.

    It is linked by the target's compiler. Raises BuildError, or TargetError where there is none.
    """
    with tempfile.TemporaryDirectory(prefix="sepc-") as name:
        directory = Path(name)
        paths = bundle.write(directory)
        (directory / "packed.o").write_bytes(packed)
        sources = [path.name for path in paths if path.suffix in (".c", ".S", ".o") and path.stat().st_size]
        flags = ["-shared", "-fPIC", "-O1", "-pthread", "-I."]
        run_compiler([cross_compiler(target), *flags, "-o", "library", *sources, "packed.o", "-lm"], directory)
        return (directory / "library").read_bytes()


def library_files(bundle: Bundle, one: Specialization, library: bytes) -> tuple[Interface, dict[str, bytes]]:
    """What `sepc.runtime.exported.write` takes: how the library is called, and the files beside the manifest."""
    interface = interface_of(bundle.name, one)
    program = bundle.program
    inputs, outputs = (
        [(dtype_name(storage.dtype), list(shape)) for storage, shape in zip(storages, own, strict=True)]
        for storages, own in zip((program.inputs, program.storages), shapes(bundle), strict=True)
    )
    readme = render("library.md", b=bundle, size=len(library), inputs=inputs, outputs=outputs)
    return interface, {interface.library: library, "README.md": readme.encode()}


def interface_of(name: str, one: Specialization) -> Interface:
    """How the library of a specialisation is called."""
    description, program = one.description, one.executable.program
    leaves = description.signature.leaves
    tensors = [leaf for leaf in leaves if isinstance(leaf, TensorLeaf)]
    numbers = iter(range(len(tensors)))
    numbered = [next(numbers) if isinstance(leaf, TensorLeaf) else leaf for leaf in leaves]
    return Interface(
        name=name,
        threads=description.threads,
        arena_bytes=program.arena_bytes,
        inputs=tuple(Input(leaf.shape, dtype_name(leaf.dtype), leaf.contiguous) for leaf in tensors),
        order=description.order,
        outputs=tuple(Output(storage.elements, dtype_name(storage.dtype)) for storage in program.storages),
        arguments=_structure(description.signature.spec, numbered),
        results=_results(program, description.order, len(tensors)),
        structure=_structure(description.results.spec, description.results.leaves),
        regions=description.regions,
        calls=program.calls,
        number_of_calls=program.number_of_calls,
    )


def shapes(bundle: Bundle) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of inputs and outputs to those who call the library as a function of tensors.

    Inputs whose dimension 1 is innermost are told with that as the last. An output that is not one result and nothing
    else is told as elements in a row.
    """
    program = bundle.program
    inputs = [_in_memory(leaf) for leaf in bundle.leaves] or [(storage.elements,) for storage in program.inputs]
    outputs = []
    for number, storage in enumerate(program.storages):
        block = FIRST_INPUT + len(program.inputs) + number
        own = [one for one in program.results if one.block == block and one.dtype == storage.dtype]
        whole = [one.shape for one in own if one.offset == 0 and _is_dense(one)]
        fits = len(own) == 1 and whole and math.prod(whole[0]) == storage.elements
        outputs.append(whole[0] if fits else (storage.elements,))
    return inputs, outputs


def dtype_name(dtype: torch.dtype) -> str:
    """What NumPy and TVM call it."""
    return str(dtype).removeprefix("torch.")


def _results(program: Program, order: tuple[int, ...], arguments: int) -> tuple[exported.Result, ...]:
    """The results, with arguments and outputs counted through."""
    inputs, found = len(program.inputs), []
    for one in program.results:
        number = one.block - FIRST_INPUT
        if number < 0:
            raise ArtifactError("A result is a weight, and lies in no output")
        block = order[number] if number < inputs else arguments + number - inputs
        found.append(exported.Result(block, one.offset, one.shape, one.strides, dtype_name(one.dtype)))
    return tuple(found)


def _structure(spec: pytree.TreeSpec, leaves: Sequence[Any]) -> object:
    """A structure with a `Value` for each number."""
    filled = [leaf.value if isinstance(leaf, Constant) else Value(leaf) for leaf in leaves]
    return pytree.tree_unflatten(filled, spec)


def _in_memory(leaf: TensorLeaf) -> tuple[int, ...]:
    if leaf.contiguous:
        return leaf.shape
    batch, channels, *pixels = leaf.shape
    return (batch, *pixels, channels)


def _is_dense(one: TensorReference) -> bool:
    return same_strides(one.shape, one.strides, contiguous_strides(one.shape))
