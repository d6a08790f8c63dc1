"""Dataclasses as JSON and back, by the types of their fields.

Reading takes nothing on trust: what does not have the types that the dataclass declares is a ValueError, and nothing is
looked up by name but dtypes and the like, operators (`host_graph.function_of`) and pytree nodes that are registered.
Tensors are kept beside the JSON, in one run of bytes. A field of type `object` is a plain value of Python.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union

import torch
from torch.utils import _pytree as pytree

from sepc.errors import ArtifactError
from sepc.runtime.host_graph import Function, Value, function_of, name_of

_TENSOR_ALIGNMENT = 64
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
# What a defaultdict may be made with: PyTorch would import any module that a file names.
_FACTORIES = ("int", "float", "str", "bool", "list", "dict", "set", "tuple")


class Encoder:
    """Makes JSON of dataclasses; `tensors` gathers the bytes of the tensors in them."""

    def __init__(self) -> None:
        self.tensors = bytearray()
        self._writers: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
            ((list, tuple), lambda value: [self.encode(one) for one in value]),
            (Mapping, lambda value: {str(name): self.encode(one) for name, one in value.items()}),
            (torch.dtype, _short),
            (torch.Tensor, self._tensor),
            (pytree.TreeSpec, spec_text),
            (Callable, name_of),
        )

    def encode(self, value: Any) -> Any:
        """The JSON of a dataclass or of one field of it; raises ArtifactError for what cannot be written."""
        if is_dataclass(value) and not isinstance(value, type | pytree.TreeSpec):
            hints = _hints(type(value))
            return {one.name: self._field(getattr(value, one.name), hints[one.name]) for one in fields(value)}
        return next((write(value) for kind, write in self._writers if isinstance(value, kind)), value)

    def _field(self, value: Any, hint: Any) -> Any:
        if hint is object:
            return plain_json(value)
        if object not in typing.get_args(hint):
            return self.encode(value)
        if isinstance(value, Mapping):
            return {name: plain_json(one) for name, one in value.items()}
        return [plain_json(one) for one in value]

    def _tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        self.tensors.extend(bytes(-len(self.tensors) % _TENSOR_ALIGNMENT))
        offset = len(self.tensors)
        data = tensor.detach().contiguous()
        self.tensors.extend(data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        return {"shape": list(tensor.shape), "dtype": _short(tensor.dtype), "offset": offset}


class Decoder:
    """Reads what an `Encoder` wrote, whose `tensors` it is given."""

    def __init__(self, tensors: bytes = b"") -> None:
        self._tensors = bytearray(tensors)  # PyTorch warns of memory that it may not write to.

    def decode(self, hint: Any, value: Any) -> Any:
        """The value of type `hint` that `value` is the JSON of.

        Raises ValueError, TypeError or KeyError where it is of another type, ArtifactError where it names what there is
        not.
        """
        if hint in _READERS:
            return _READERS[hint](value)
        if hint is torch.Tensor:
            return self._tensor(_of(dict, value))
        if isinstance(hint, type) and is_dataclass(hint):
            return self._record(hint, _of(dict, value))
        return self._container(typing.get_origin(hint), typing.get_args(hint), value)

    def _container(self, origin: Any, arguments: tuple[Any, ...], value: Any) -> Any:
        if origin in (Union, types.UnionType):
            return self._alternative(arguments, value)
        if origin is tuple and arguments[-1] is not Ellipsis:
            return tuple(self.decode(one, part) for one, part in zip(arguments, _of(list, value), strict=True))
        if origin in (list, tuple):
            return origin(self.decode(arguments[0], part) for part in _of(list, value))
        if origin is dict:
            return {name: self.decode(arguments[1], part) for name, part in _of(dict, value).items()}
        raise TypeError(f"there is no way to read {origin}")

    def _record(self, kind: type, value: dict[str, Any]) -> Any:
        hints = _hints(kind)
        if value.keys() != hints.keys():
            raise ValueError(f"{kind.__name__} has the fields {sorted(hints)}, found {sorted(value)}")
        return kind(**{name: self.decode(hints[name], part) for name, part in value.items()})

    def _alternative(self, alternatives: tuple[Any, ...], value: Any) -> Any:
        """The first of the types of a union that fits: none of ours overlap."""
        reasons = []
        for one in alternatives:
            try:
                return self.decode(one, value)
            except (ValueError, TypeError, KeyError) as error:
                reasons.append(str(error))
        raise ValueError("; ".join(reasons))

    def _tensor(self, value: dict[str, Any]) -> torch.Tensor:
        shape, dtype = self.decode(tuple[int, ...], value["shape"]), _dtype(value["dtype"])
        offset, count = _of(int, value["offset"]), math.prod(shape)
        if min((*shape, offset)) < 0 or offset + count * dtype.itemsize > len(self._tensors):
            raise ValueError(f"a tensor of shape {shape} at byte {offset} is not inside {len(self._tensors)} bytes")
        if not count:
            return torch.empty(shape, dtype=dtype)
        # A copy, whose memory is aligned.
        return torch.frombuffer(self._tensors, dtype=dtype, count=count, offset=offset).reshape(shape).clone()


def plain_json(value: object) -> Any:
    """The JSON of a plain value of Python: numbers, text, lists, dtypes, `Value`s; ArtifactError for anything else."""
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    for name, (kind, write) in _WRITERS.items():
        # A list of PyTorch's graphs is of a class of its own. But a named tuple is more than its elements.
        if type(value) is kind or (kind is not tuple and isinstance(value, kind)):
            return {name: write(value)}
    raise ArtifactError(
        f"A value of type {type(value).__name__} cannot be saved",
        where=repr(value)[:200],
        why="files hold tensors, numbers, text, and lists and tuples of these",
        fix="leave it out of the arguments and results of the model",
    )


def plain_value(value: Any) -> object:
    """What `plain_json` made JSON of."""
    if not isinstance(value, dict):
        return _of((bool, int, float, str, types.NoneType), value)
    ((kind, content),) = value.items()
    if kind in _NAMED:
        return _named(kind, content)
    readers: dict[str, Callable[[Any], object]] = {
        "float": lambda text: float(_of(str, text)),
        "complex": lambda parts: complex(*[_of((int, float), plain_value(part)) for part in parts]),
        "value": lambda index: Value(_of(int, index)),
        "device": lambda text: torch.device(_of(str, text)),
        "list": lambda parts: [plain_value(part) for part in _of(list, parts)],
        "tuple": lambda parts: tuple(plain_value(part) for part in _of(list, parts)),
    }
    return readers[kind](content)


def spec_text(spec: pytree.TreeSpec) -> str:
    """A structure as text; raises ArtifactError if one of its types has no name that another process knows."""
    try:
        text = pytree.treespec_dumps(spec)
        if _spec(text) == spec:
            return text
        why = "it does not come back as it was"
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        why = str(error).splitlines()[0]
    raise ArtifactError(
        "The structure of the model's arguments or result cannot be saved",
        where=str(spec)[:200],
        why=why,
        fix="register its type with a serialized_type_name by torch.utils._pytree, or pass and return tuples and dicts",
    )


def _spec(text: str) -> pytree.TreeSpec:
    _require_harmless(json.loads(_of(str, text)))
    try:
        return pytree.treespec_loads(text)
    except NotImplementedError as error:
        raise ValueError(str(error)) from error


def _require_harmless(part: Any) -> None:
    """Nothing, or ValueError for a structure for which PyTorch would import modules that the file names."""
    if isinstance(part, str) and part[:1] in ("{", "["):  # The context of a node may be JSON inside of JSON.
        part = json.loads(part)
    if isinstance(part, list):
        for one in part:
            _require_harmless(one)
    elif isinstance(part, dict):
        module, name = part.get("default_factory_module", "builtins"), part.get("default_factory_name", "list")
        if module != "builtins" or name not in _FACTORIES or "__enum__" in part:
            raise ValueError("a structure may not name a module")
        for one in part.values():
            _require_harmless(one)


def _of(kind: type | tuple[type, ...], value: Any) -> Any:
    """`value`, whose type must be exactly one of these."""
    if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
        raise ValueError(f"expected {kind}, found {str(value)[:80]!r}")
    return value


def _named(kind: str, name: Any) -> Any:
    found = getattr(torch, _of(str, name), None)
    if not isinstance(found, _NAMED[kind]):
        raise ValueError(f"there is no {kind} {name!r}")
    return found


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype:
    found: torch.dtype = _named("dtype", name)
    return found


_READERS: dict[Any, Callable[[Any], Any]] = {
    int: lambda value: _of(int, value),
    bool: lambda value: _of(bool, value),
    str: lambda value: _of(str, value),
    float: lambda value: float(_of((int, float), value)),
    types.NoneType: lambda value: _of(types.NoneType, value),
    object: plain_value,
    torch.dtype: _dtype,
    pytree.TreeSpec: _spec,
    Function: lambda value: function_of(_of(str, value)),
}


_WRITERS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "float": (float, repr),
    "complex": (complex, lambda value: [plain_json(value.real), plain_json(value.imag)]),
    "value": (Value, lambda value: value.index),
    "device": (torch.device, str),
    **{name: (kind, _short) for name, kind in _NAMED.items()},
    "list": (list, lambda value: [plain_json(one) for one in value]),
    "tuple": (tuple, lambda value: [plain_json(one) for one in value]),
}


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, whose annotations are text."""
    return typing.get_type_hints(kind)
