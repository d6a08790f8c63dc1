"""The bundle: what is in it, and how it is written. Its files are the templates beside this page.

One function runs the model; it takes an arena, the weights, and the memory of inputs and outputs. There are no other
memory blocks, so that `sepc.runtime.program` is all that its C source tells: which kernels, at which addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import jinja2
import torch

import sepc
from sepc.errors import ArtifactError, InputError, ModelError
from sepc.runtime.program import CONSTANTS, FIRST_INPUT, HostCall, KernelCall, Program, Storage, TensorReference
from sepc.runtime.signature import TensorLeaf
from sepc.runtime.specialization import Specialization
from sepc.target import Target

C_TYPES: Final = {
    torch.float64: "double",
    torch.float32: "float",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "uint8_t",
    torch.float16: "uint16_t",
    torch.bfloat16: "uint16_t",
}
PROGRAM: Final = "main"
THREADS_TEMPLATES: Final = ("threads.h", "threads.c")


@dataclass(frozen=True)
class Tensor:
    """An input or output in C.

    Attributes:
        text: what it holds, for a reader. c_type: of its elements. size_bytes: of its memory.
    """

    text: str
    c_type: str
    size_bytes: int


@dataclass(frozen=True)
class Bundle:
    """A specialisation in C.

    Attributes:
        name: of its function, with ``_run`` behind it. target: what it was compiled for, for a reader.
        threads: how many run it. program: what it runs. constants: the weights, `Program.constants_bytes` of them.
        objects: an object file with all kernels, whose symbols begin with `name` and an underscore.
        leaves: the arguments that the program's inputs are, where they are known.
        shared: whether it is to become a shared library for TVM's runtime, which can note the time of each call.
    """

    name: str
    target: str
    threads: int
    program: Program
    constants: torch.Tensor
    objects: bytes
    leaves: tuple[TensorLeaf, ...] = ()
    shared: bool = False

    @staticmethod
    def of(name: str, target: Target, one: Specialization, objects: bytes) -> Bundle:
        """The bundle of a specialisation for which `require_writable` finds nothing wrong."""
        description, executable = one.description, one.executable
        leaves = [leaf for leaf in description.signature.leaves if isinstance(leaf, TensorLeaf)]
        ordered = tuple(leaves[number] for number in description.order)
        constants, threads = executable.constants, description.threads
        return Bundle(name, target.text, threads, executable.program, constants, objects, ordered)

    @property
    def macro(self) -> str:
        """What the names of its macros begin with."""
        return self.name.upper()

    @property
    def calls(self) -> list[KernelCall]:
        """All calls, in order."""
        return [call for segment in self.program.segments for call in segment]

    @property
    def kernels(self) -> dict[str, int]:
        """The number of pointers that each kernel takes."""
        return {call.symbol: len(call.arguments) for call in self.calls}

    @property
    def kernel_bytes(self) -> int:
        """The size of the object file."""
        return len(self.objects)

    @cached_property
    def inputs(self) -> list[Tensor]:
        """What is read."""
        texts = map(_text, self.leaves) if self.leaves else map(_elements, self.program.inputs)
        return [_tensor(storage, text) for storage, text in zip(self.program.inputs, texts, strict=True)]

    @cached_property
    def outputs(self) -> list[Tensor]:
        """What is written."""
        return [_tensor(storage, _elements(storage)) for storage in self.program.storages]

    @property
    def results(self) -> list[str]:
        """Where each result of the model is, for a reader."""
        return [self._place(reference) for reference in self.program.results]

    def _place(self, reference: TensorReference) -> str:
        first_output = FIRST_INPUT + len(self.program.inputs)
        if reference.block >= first_output:
            where = f"output {reference.block - first_output}"
        else:
            where = "the weights" if reference.block == CONSTANTS else f"input {reference.block - FIRST_INPUT}"
        offset = f" from element {reference.offset} on" if reference.offset else ""
        shape, strides = list(reference.shape), list(reference.strides)
        dtype = str(reference.dtype).removeprefix("torch.")
        return f"{dtype}{shape} in {where}{offset}, with strides of {strides} elements"

    def files(self) -> Iterator[tuple[str, bytes | memoryview]]:
        """Names and contents."""
        templates = {"model.h": f"{self.name}.h", "model.c": f"{self.name}.c", "weights.S": "weights.S"}
        if self.shared:
            templates |= {"tvm.c": f"{self.name}_tvm.c"}
        else:
            templates |= {f"{PROGRAM}.c": f"{PROGRAM}.c", "CMakeLists.txt": "CMakeLists.txt", "README.md": "README.md"}
        if self.threads > 1:
            templates |= {name: f"{self.name}_{name}" for name in THREADS_TEMPLATES}
        for template, name in templates.items():
            yield name, render(template, b=self).encode()
        yield "kernels.o", self.objects
        yield "weights.bin", self.weights

    @property
    def weights(self) -> bytes | memoryview:
        """The weights; at least a byte, since nothing has the address of no bytes."""
        constants = self.constants[: self.program.constants_bytes]
        return constants.numpy().data if len(constants) else bytes(1)

    def write(self, directory: Path) -> list[Path]:
        """Write the files into `directory`, which is made if need be. Raises ArtifactError if that cannot be."""
        return write_files(directory, self.files())


def write_files(directory: Path, files: Iterable[tuple[str, bytes | memoryview]]) -> list[Path]:
    """Write files of these names and contents into `directory`, which is made if need be.

    Raises ArtifactError if that cannot be.
    """
    paths = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files:
            paths.append(directory / name)
            paths[-1].write_bytes(content)
    except OSError as error:
        why = error.strerror or str(error)
        raise ArtifactError("The bundle cannot be written", where=str(directory), why=why) from error
    return paths


def render(template: str, **values: object) -> str:
    """The text of a template with these values."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sepc", "bundle"),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{template}.jinja").render(version=sepc.__version__, **values)


def require_writable(name: str, one: Specialization) -> None:
    """Raise InputError if no bundle can be called `name`, ModelError if PyTorch runs a part of `one`."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name == PROGRAM:
        fix = f"use letters, digits and underscores, and not {PROGRAM!r}, which is a file of its own"
        raise InputError(f"A bundle cannot be called {name!r}", fix=fix)
    if any(isinstance(step, HostCall) for step in one.executable.program.steps):
        regions = [f"{region.name} ({region.reason})" for region in one.description.regions if region.kernel == "torch"]
        why = f"PyTorch would run {', '.join(regions)}"
        raise ModelError("A bundle has no PyTorch", why=why, fix="compile with fullgraph=True to see the lines")


def _tensor(storage: Storage, text: str) -> Tensor:
    size_bytes = max(1, storage.elements * storage.dtype.itemsize)
    return Tensor(text, C_TYPES[storage.dtype], size_bytes)


def _elements(storage: Storage) -> str:
    return f"{storage.elements} elements of {str(storage.dtype).removeprefix('torch.')}"


def _text(leaf: TensorLeaf) -> str:
    """Type and shape, and in which order elements lie."""
    order = ", in this order of dimensions" if leaf.contiguous else ", dimension 1 (channels) innermost"
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}{order}"
