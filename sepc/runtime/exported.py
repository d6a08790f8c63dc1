"""Exported models: a shared library with the weights in it, and a manifest, run from NumPy without PyTorch or TVM.

See `CompiledModel.export` with ``format="tvm"``. The same library serves TVM's runtime, on this host or on another one.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sepc.errors import ArtifactError, InputError, SepcError
from sepc.runtime.manifest import (
    MALFORMED,
    MANIFEST,
    Heading,
    damaged,
    heading_of,
    require_format,
    unreadable,
)
from sepc.runtime.records import RecordDecoder, RecordEncoder, Value
from sepc.runtime.report import Profile, RegionReport
from sepc.target import Target

FORMAT: Final = "sepc-tvm"
FORMAT_VERSION: Final = 1
CALL, PROFILE = "call", "profile"
Array = NDArray[Any]


@dataclass(frozen=True)
class Input:
    """A tensor that is given. Its strides are those of a contiguous array, or else dimension 1 is innermost."""

    shape: tuple[int, ...]
    dtype: str
    contiguous: bool

    def __str__(self) -> str:
        """Type and shape."""
        return f"{self.dtype}{list(self.shape)}{'' if self.contiguous else ' with dimension 1 innermost'}"


@dataclass(frozen=True)
class Output:
    """Memory that is written."""

    elements: int
    dtype: str


@dataclass(frozen=True)
class Result:
    """A tensor in memory: number `block` of inputs and outputs, counted through; strides in elements."""

    block: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Interface:
    """How an exported model is called.

    Attributes:
        name: what the names of its functions begin with. threads: how many run it. arena_bytes: as in `Program`.
        inputs: the tensors among the arguments. order: which of them its function reads. outputs: what it writes.
        arguments: the user's (args, kwargs), with a `Value` for each input.
        results: tensors among inputs and outputs. structure: the user's result, with a `Value` for each of these.
        regions: what it is made of. calls: as in `Program`. number_of_calls: as in `Program`.
    """

    name: str
    threads: int
    arena_bytes: int
    inputs: tuple[Input, ...]
    order: tuple[int, ...]
    outputs: tuple[Output, ...]
    arguments: object
    results: tuple[Result, ...]
    structure: object
    regions: tuple[RegionReport, ...]
    calls: dict[str, tuple[int, int]]
    number_of_calls: int

    @property
    def library(self) -> str:
        """The name of the library's file."""
        return f"{self.name}.so"

    def require_sound(self) -> None:
        """Nothing, if all results lie in their memory, and calls and values are such as there are; else ValueError."""
        sizes = [math.prod(one.shape) * dtype_of(one.dtype).itemsize for one in self.inputs]
        sizes += [one.elements * dtype_of(one.dtype).itemsize for one in self.outputs]
        for one in self.results:
            if min((one.block, one.offset, *one.shape, *one.strides)) < 0 or len(one.shape) != len(one.strides):
                raise ValueError("a result has an impossible shape")
            pairs = zip(one.shape, one.strides, strict=True)
            last = 0 if 0 in one.shape else 1 + sum((size - 1) * stride for size, stride in pairs)
            if (one.offset + last) * dtype_of(one.dtype).itemsize > sizes[one.block]:
                raise ValueError("a result lies outside of its memory")
        if not set(self.order) <= set(range(len(self.inputs))):
            raise ValueError("an input is none of the arguments")
        if sorted(_values(self.arguments)) != list(range(len(self.inputs))):
            raise ValueError("the inputs are not those of the arguments")
        if not set(_values(self.structure)) <= set(range(len(self.results))):
            raise ValueError("a result is none of the model's")
        if [one.name for one in self.regions] != list(self.calls):
            raise ValueError("the regions are not those of the program")
        if not all(0 <= first <= end <= self.number_of_calls for first, end in self.calls.values()):
            raise ValueError("a region has calls that there are not")


@dataclass(frozen=True)
class Manifest(Heading):
    """What is written beside the library."""

    interface: Interface


def write(directory: Path, target: Target, interface: Interface, files: Mapping[str, bytes]) -> list[Path]:
    """Write `files` and a manifest into `directory`, which is made if need be; returns the paths.

    Raises ArtifactError if that cannot be.
    """
    heading = heading_of(FORMAT, FORMAT_VERSION, target, files.items())
    manifest = RecordEncoder().encode(Manifest(**heading, interface=interface))
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    paths = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in {**files, MANIFEST: text.encode()}.items():
            paths.append(directory / name)
            # A library that a process has mapped must not change under it: a new file, of the same name.
            own = directory / f".{name}.tmp"
            own.write_bytes(content)
            own.replace(paths[-1])
    except OSError as error:
        why = error.strerror or str(error)
        raise ArtifactError("The library cannot be written", where=str(directory), why=why) from error
    return paths


class ExportedModel:
    """A model from a directory that `CompiledModel.export` wrote; see `sepc.load`. It takes and gives NumPy arrays.

    It runs for the one set of shapes that it was exported with, on so many threads as then. Calls may come from several
    Python threads, and wait for each other.
    """

    def __init__(self, path: Path, target: Target, interface: Interface) -> None:
        self.target, self.threads, self.arena_bytes = target, interface.threads, interface.arena_bytes
        self.regions = list(interface.regions)
        self._path, self._interface = path, interface
        library = _loaded(path / interface.library)
        try:
            self._call, self._profile = (library[f"{interface.name}_{one}"] for one in (CALL, PROFILE))
        except AttributeError as error:
            raise damaged(path, error) from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for these arguments: arrays, or what NumPy makes arrays of. Raises InputError."""
        inputs = self._inputs(args, kwargs)
        outputs = self._outputs()
        self._run(self._call, inputs, outputs)
        blocks = [*inputs, *outputs]
        results = [_view(blocks[one.block], one) for one in self._interface.results]
        # What is returned is the caller's: an input that is also a result is copied.
        results = [
            one.copy() if place.block < len(inputs) else one
            for place, one in zip(self._interface.results, results, strict=True)
        ]
        return _filled(self._interface.structure, results)

    def profile(self, *args: Any, repeats: int = 50, **kwargs: Any) -> Profile:
        """Measured time of each region for these arguments, median of so many runs, beside its prediction."""
        inputs, interface = self._inputs(args, kwargs), self._interface
        stamps = np.zeros((repeats + 1, interface.number_of_calls + 1))
        for row in stamps:
            self._run(self._profile, inputs, [*self._outputs(), row])
        return Profile.of(self.regions, median_times(stamps[1:], interface.calls))

    def _run(self, function: Any, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        blocks = [*(inputs[number] for number in self._interface.order), *outputs]
        if status := function(*[ctypes.c_void_p(block.ctypes.data) for block in blocks]):
            why = f"{function.__name__} returns {status}: its threads could not be started"
            raise SepcError("The model did not run", where=str(self._path), why=why)

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Array]:
        interface = self._interface
        found: dict[int, Any] = {}
        if not _match(interface.arguments, (args, dict(kwargs)), found):
            why = f"it is for calls like {_shown(interface.arguments, interface.inputs)}"
            raise InputError("These arguments are not those of the exported model", where=str(self._path), why=why)
        return [self._input(number, wanted, found[number]) for number, wanted in enumerate(interface.inputs)]

    def _input(self, number: int, wanted: Input, given: Any) -> Array:
        """The array of an input, in memory as the kernels read it."""
        array = np.asarray(given)
        if array.shape != wanted.shape or array.dtype != dtype_of(wanted.dtype):
            raise InputError(
                f"Input {number} is {array.dtype}{list(array.shape)}",
                where=str(self._path),
                why=f"the model was exported for {wanted}",
                fix="convert it, or export the model for inputs of this type and shape",
            )
        if wanted.contiguous:
            return np.ascontiguousarray(array)
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)

    def _outputs(self) -> list[Array]:
        return [np.empty(one.elements, dtype_of(one.dtype)) for one in self._interface.outputs]


def load(path: Path) -> ExportedModel:
    """The exported model in the directory `path`. Raises ArtifactError as `sepc.load` does."""
    try:
        found = json.loads((path / MANIFEST).read_bytes())
        require_format(found, FORMAT, FORMAT_VERSION, path)
        manifest: Manifest = RecordDecoder().decode(Manifest, found)
        interface = manifest.interface
        if interface.library not in manifest.members or Path(interface.library).name != interface.library:
            raise ValueError("the manifest lists no library")
        manifest.require_host(path)
        for name, member in manifest.members.items():
            if Path(name).name != name:
                raise ValueError("a file lies elsewhere")
            member.require(name, (path / name).read_bytes())
        interface.require_sound()
    except SepcError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except MALFORMED as error:
        raise damaged(path, error) from error
    return ExportedModel(path, manifest.target, interface)


def median_times(stamps: Array, calls: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Median time of each region in microseconds, of rows of times in seconds before and after each call."""
    middle = len(stamps) // 2
    return {
        name: float(np.sort(stamps[:, end] - stamps[:, first])[middle] * 1e6) for name, (first, end) in calls.items()
    }


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's type of that name; raises ArtifactError for one that it does not have."""
    try:
        if name == "bfloat16":
            import ml_dtypes

            name = ml_dtypes.bfloat16
        found: np.dtype[Any] = np.dtype(name)
    except ImportError as error:
        raise ArtifactError(f"NumPy has no {name}", why=str(error), fix="pip install ml_dtypes") from error
    return found


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(os.fspath(path.resolve()))
    except OSError as error:
        raise ArtifactError(
            "The library of an exported model cannot be loaded",
            where=str(path),
            why=str(error),
            fix="export it with a compiler for an older system, or where it is to run",
        ) from error


def _view(block: Array, place: Result) -> Array:
    """The array that `place` names in the memory of `block`."""
    dtype = dtype_of(place.dtype)
    order = np.argsort([-stride for stride in block.strides], kind="stable")
    flat = block.transpose(order).reshape(-1).view(dtype)[place.offset :]
    strides = [stride * dtype.itemsize for stride in place.strides]
    return np.lib.stride_tricks.as_strided(flat, place.shape, strides)


def _values(template: Any) -> Iterator[int]:
    if isinstance(template, Value):
        yield template.index
    elif isinstance(template, list | tuple):
        for one in template:
            yield from _values(one)
    elif isinstance(template, dict):
        yield from _values(list(template.values()))


def _filled(template: Any, values: Sequence[Any]) -> Any:
    """A structure with its `Value`s replaced."""
    if isinstance(template, Value):
        return values[template.index]
    if isinstance(template, list | tuple):
        return type(template)(_filled(one, values) for one in template)
    if isinstance(template, dict):
        return {name: _filled(one, values) for name, one in template.items()}
    return template


def _match(template: Any, given: Any, found: dict[int, Any]) -> bool:
    """Whether `given` has the structure and constants of `template`; what is given for its `Value`s goes to `found`."""
    if isinstance(template, Value):
        found[template.index] = given
        return True
    if isinstance(template, list | tuple):
        fits = isinstance(given, list | tuple) and len(given) == len(template)
        return fits and all(_match(one, part, found) for one, part in zip(template, given, strict=True))
    if isinstance(template, dict):
        fits = isinstance(given, dict) and given.keys() == template.keys()
        return fits and all(_match(one, given[name], found) for name, one in template.items())
    return type(given) is type(template) and bool(given == template)


def _shown(template: Any, inputs: Sequence[Input]) -> str:
    """The structure of a call, for a reader."""
    args, kwargs = _filled(template, [str(one) for one in inputs])
    parts = [str(one) for one in args] + [f"{name}={one}" for name, one in kwargs.items()]
    return f"({', '.join(parts)})"
