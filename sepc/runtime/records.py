"""Dataclasses as JSON and back, by the types of their fields; PyTorch's types are added by `sepc.runtime.encoding`.

Reading takes nothing on trust: what does not have the types that the dataclass declares is a ValueError, and nothing is
looked up by name. A field of type `object` is a plain value of Python.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union

from sepc.errors import ArtifactError

# Per kind of plain value that JSON lacks, by its name there: its type, and how it is written.
Writers = Mapping[str, tuple[type, Callable[[Any], Any]]]


@dataclass(frozen=True)
class Value:
    """A stand-in for value number `index` of something: of a graph its inputs come first, then its constants, then what
    its operators return.
    """

    index: int


class RecordEncoder:
    """Makes JSON of dataclasses."""

    def __init__(self) -> None:
        self._writers: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
            ((list, tuple), lambda value: [self.encode(one) for one in value]),
            (Mapping, lambda value: {str(name): self.encode(one) for name, one in value.items()}),
        )
        self._plain_writers: Writers = {
            "float": (float, repr),
            "complex": (complex, lambda value: [self.plain(value.real), self.plain(value.imag)]),
            "value": (Value, lambda value: value.index),
            "list": (list, lambda value: [self.plain(one) for one in value]),
            "tuple": (tuple, lambda value: [self.plain(one) for one in value]),
            "dict": (dict, lambda value: [[self.plain(name), self.plain(one)] for name, one in value.items()]),
        }

    def encode(self, value: Any) -> Any:
        """The JSON of a dataclass or of one field of it; raises ArtifactError for what cannot be written."""
        if is_dataclass(value) and not isinstance(value, type):
            hints = _hints(type(value))
            return {one.name: self._field(getattr(value, one.name), hints[one.name]) for one in fields(value)}
        return next((write(value) for kind, write in self._writers if isinstance(value, kind)), value)

    def plain(self, value: object) -> Any:
        """The JSON of a plain value: numbers, text, lists, dicts, `Value`s; raises ArtifactError for anything else."""
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return value
        for name, (kind, write) in self._plain_writers.items():
            # A list of PyTorch's graphs is of a class of its own. But a named tuple is more than its elements.
            if type(value) is kind or (kind is not tuple and isinstance(value, kind)):
                return {name: write(value)}
        raise ArtifactError(
            f"A value of type {type(value).__name__} cannot be saved",
            where=repr(value)[:200],
            why="files hold tensors, numbers, text, and lists and tuples of these",
            fix="leave it out of the arguments and results of the model",
        )

    def _field(self, value: Any, hint: Any) -> Any:
        if hint is object:
            return self.plain(value)
        if object not in typing.get_args(hint):
            return self.encode(value)
        if isinstance(value, Mapping):
            return {name: self.plain(one) for name, one in value.items()}
        return [self.plain(one) for one in value]


class RecordDecoder:
    """Reads what a `RecordEncoder` wrote."""

    def __init__(self) -> None:
        self._readers: dict[Any, Callable[[Any], Any]] = {
            int: lambda value: require_type(int, value),
            bool: lambda value: require_type(bool, value),
            str: lambda value: require_type(str, value),
            float: lambda value: float(require_type((int, float), value)),
            types.NoneType: lambda value: require_type(types.NoneType, value),
            object: self.plain,
        }
        self._plain_readers: dict[str, Callable[[Any], object]] = {
            "float": lambda text: float(require_type(str, text)),
            "complex": lambda parts: complex(*[require_type((int, float), self.plain(part)) for part in parts]),
            "value": lambda index: Value(require_type(int, index)),
            "list": lambda parts: [self.plain(part) for part in require_type(list, parts)],
            "tuple": lambda parts: tuple(self.plain(part) for part in require_type(list, parts)),
            "dict": lambda pairs: {self.plain(name): self.plain(part) for name, part in require_type(list, pairs)},
        }

    def decode(self, hint: Any, value: Any) -> Any:
        """The value of type `hint` that `value` is the JSON of.

        Raises ValueError, TypeError or KeyError where it is of another type, ArtifactError where it names what there is
        not.
        """
        if hint in self._readers:
            return self._readers[hint](value)
        if isinstance(hint, type) and is_dataclass(hint):
            return self._record(hint, require_type(dict, value))
        return self._container(typing.get_origin(hint), typing.get_args(hint), value)

    def plain(self, value: Any) -> object:
        """What `RecordEncoder.plain` made JSON of."""
        if not isinstance(value, dict):
            return require_type((bool, int, float, str, types.NoneType), value)
        ((kind, content),) = value.items()
        return self._plain_readers[kind](content)

    def _container(self, origin: Any, arguments: tuple[Any, ...], value: Any) -> Any:
        if origin in (Union, types.UnionType):
            return self._alternative(arguments, value)
        if origin is tuple and arguments[-1] is not Ellipsis:
            return tuple(self.decode(one, part) for one, part in zip(arguments, require_type(list, value), strict=True))
        if origin in (list, tuple):
            return origin(self.decode(arguments[0], part) for part in require_type(list, value))
        if origin is dict:
            return {name: self.decode(arguments[1], part) for name, part in require_type(dict, value).items()}
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


def require_type(kind: type | tuple[type, ...], value: Any) -> Any:
    """`value`, whose type must be exactly one of these."""
    if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
        raise ValueError(f"expected {kind}, found {str(value)[:80]!r}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, whose annotations are text."""
    return typing.get_type_hints(kind)
