"""A compiled model as a shared library with functions of TVM's runtime: ``main`` runs it, ``profile`` times it too."""

from __future__ import annotations

from sepc.backends.packed import Packed, TensorType, packed_object
from sepc.bundle.bundle import Bundle
from sepc.bundle.library import dtype_name, link_library, shapes
from sepc.runtime.exported import CALL, PROFILE
from sepc.target import Target

MAIN = "main"


def shared_library(bundle: Bundle, target: Target) -> bytes:
    """The library of a bundle that is `shared`. Raises BuildError, or TargetError where nothing can link it.

    Its functions take the inputs, then the outputs; ``profile`` takes behind these the times in seconds before and
    after each call, which it notes.
    """
    inputs, outputs = shapes(bundle)
    program = bundle.program
    names = [f"input_{number}" for number in range(len(inputs))]
    names += [f"output_{number}" for number in range(len(outputs))]
    tensors = [
        TensorType(name, shape, dtype_name(storage.dtype), storage.dtype.itemsize)
        for name, shape, storage in zip(names, (*inputs, *outputs), (*program.inputs, *program.storages), strict=True)
    ]
    stamps = TensorType("stamps", (program.number_of_calls + 1,), "float64", 8)
    functions = {
        MAIN: Packed(f"{bundle.name}_{CALL}", tensors),
        PROFILE: Packed(f"{bundle.name}_{PROFILE}", [*tensors, stamps]),
    }
    return link_library(bundle, packed_object(functions, target.llvm_target()), target)
