"""Dataclasses with tensors and other types of PyTorch as JSON and back: see `sepc.runtime.records`.

What is looked up by name are dtypes and the like, operators (`host_graph.function_of`) and pytree nodes that are
registered. Tensors are kept beside the JSON, in one run of bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sepc.errors import ArtifactError
from sepc.runtime.host_graph import Function, function_of, name_of
from sepc.runtime.records import RecordDecoder, RecordEncoder, require_type

_TENSOR_ALIGNMENT = 64
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
# What a defaultdict may be made with: PyTorch would import any module that a file names.
_FACTORIES = ("int", "float", "str", "bool", "list", "dict", "set", "tuple")


def _name_return_types() -> None:
    """Give tuples that operators such as topk return names in texts of structures, where PyTorch (2.14) does not."""
    for kind in torch.return_types.all_return_types:
        known = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
        if known is not None and known.serialized_type_name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
            name = f"torch.return_types.{kind.__name__}"
            pytree.SUPPORTED_SERIALIZED_TYPES[kind] = known._replace(serialized_type_name=name)
            pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[name] = kind


_name_return_types()


class Encoder(RecordEncoder):
    """Makes JSON of dataclasses; `tensors` gathers the bytes of the tensors in them."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = bytearray()
        self._writers = (
            *self._writers,
            (torch.dtype, _short),
            (torch.Tensor, self._tensor),
            (Callable, name_of),
        )
        self._plain_writers = {
            **self._plain_writers,
            "device": (torch.device, str),
            **{name: (kind, _short) for name, kind in _NAMED.items()},
        }

    def encode(self, value: Any) -> Any:
        """The JSON of a dataclass or of one field of it; raises ArtifactError for what cannot be written."""
        return spec_text(value) if isinstance(value, pytree.TreeSpec) else super().encode(value)

    def _tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        self.tensors.extend(bytes(-len(self.tensors) % _TENSOR_ALIGNMENT))
        offset = len(self.tensors)
        data = tensor.detach().contiguous()
        self.tensors.extend(data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        return {"shape": list(tensor.shape), "dtype": _short(tensor.dtype), "offset": offset}


class Decoder(RecordDecoder):
    """Reads what an `Encoder` wrote, whose `tensors` it is given."""

    def __init__(self, tensors: bytes = b"") -> None:
        super().__init__()
        self._tensors = bytearray(tensors)  # PyTorch warns of memory that it may not write to.
        self._readers |= {
            torch.dtype: _dtype,
            torch.Tensor: self._tensor,
            pytree.TreeSpec: _spec,
            Function: lambda value: function_of(require_type(str, value)),
        }
        self._plain_readers |= {
            "device": lambda text: torch.device(require_type(str, text)),
            **{kind: partial(_named, kind) for kind in _NAMED},
        }

    def _tensor(self, value: Any) -> torch.Tensor:
        value = require_type(dict, value)
        shape, dtype = self.decode(tuple[int, ...], value["shape"]), _dtype(value["dtype"])
        offset, count = require_type(int, value["offset"]), math.prod(shape)
        if min((*shape, offset)) < 0 or offset + count * dtype.itemsize > len(self._tensors):
            raise ValueError(f"a tensor of shape {shape} at byte {offset} is not inside {len(self._tensors)} bytes")
        if not count:
            return torch.empty(shape, dtype=dtype)
        # A copy, whose memory is aligned.
        return torch.frombuffer(self._tensors, dtype=dtype, count=count, offset=offset).reshape(shape).clone()


def plain_json(value: object) -> Any:
    """The JSON of a plain value of Python, dtypes and devices among them; ArtifactError for anything else."""
    return Encoder().plain(value)


def plain_value(value: Any) -> object:
    """What `plain_json` made JSON of."""
    return Decoder().plain(value)


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
    _require_harmless(json.loads(require_type(str, text)))
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


def _named(kind: str, name: Any) -> Any:
    found = getattr(torch, require_type(str, name), None)
    if not isinstance(found, _NAMED[kind]):
        raise ValueError(f"there is no {kind} {name!r}")
    return found


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype:
    found: torch.dtype = _named("dtype", name)
    return found
