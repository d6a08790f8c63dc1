"""The name of a compilation in the cache: a hash of everything that its result depends on.

Two compilations with one key give the same kernels: the key covers the exported graph and the bytes of its constants,
the arguments' types, the target with the figures of its machine (also those that `sepc.calibrate` measured), the
options, the versions of all that takes part, and the sources of sepc themselves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sepc.errors import ArtifactError
from sepc.runtime.encoding import plain_json, spec_text
from sepc.runtime.manifest import versions
from sepc.runtime.signature import Signature, TensorLeaf
from sepc.target import Target

_KEY_BYTES = 20


def cache_key(
    exported: ExportedProgram, signature: Signature, target: Target, threads: int, optimize: str
) -> str | None:
    """The key of a compilation; None if the model contains something that has no text which tells all of it."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    settings = (SOURCES_DIGEST, sorted(versions().items()), os.environ.get("CC", ""), target, threads, optimize)
    digest.update(repr(settings).encode())
    try:
        for line in _signature_lines(signature):
            digest.update(f"{line}\n".encode())
        for part in _program_parts(exported):
            digest.update(part)
    except ArtifactError:  # What cannot be saved cannot be kept in the cache either.
        return None
    return digest.hexdigest()


def read_sources_digest() -> str:
    """A hash of the files of this package, as they are now."""
    root = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".toml", ".c") and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


# Read when the compiler is imported: what is edited later is not what runs.
SOURCES_DIGEST = read_sources_digest()


def _signature_lines(signature: Signature) -> Iterator[str]:
    yield spec_text(signature.spec)
    for leaf in signature.leaves:
        yield repr(leaf) if isinstance(leaf, TensorLeaf) else repr(plain_json(leaf.value))


def _program_parts(exported: ExportedProgram) -> Iterator[bytes | memoryview]:
    """Everything that the result depends on in an exported program."""
    for spec in (exported.call_spec.in_spec, exported.call_spec.out_spec):
        yield spec_text(spec).encode() if spec is not None else b""
    signature = exported.graph_signature
    for one in (*signature.input_specs, *signature.output_specs):
        yield f"{one.kind} {one.arg} {one.target}\n".encode()
    yield from _graph_parts(exported.graph_module)
    for name, value in sorted({**exported.state_dict, **exported.constants}.items()):
        if not isinstance(value, torch.Tensor):
            raise ArtifactError(f"The constant {name} cannot be saved", why=f"it is {type(value).__name__}")
        yield name.encode()
        yield from _tensor_parts(value)


def _graph_parts(graph_module: fx.GraphModule) -> Iterator[bytes | memoryview]:
    """A graph with all that it reads, graphs that it calls included."""
    yield f"graph of {len(graph_module.graph.nodes)}\n".encode()
    for node in graph_module.graph.nodes:
        # The types of all else follow from those of the placeholders.
        values = pytree.tree_leaves(node.meta.get("val")) if node.op == "placeholder" else []
        parts = (node.name, node.op, _function_text(node.target), _text(node.args), _text(node.kwargs))
        yield f"{' '.join((*parts, *map(_type_text, values)))}\n".encode()
        if node.op == "get_attr":
            value = getattr(graph_module, str(node.target), None)
            if isinstance(value, fx.GraphModule):
                yield from _graph_parts(value)
            elif isinstance(value, torch.Tensor):
                yield from _tensor_parts(value)
            else:
                raise ArtifactError(f"The attribute {node.target} cannot be saved")


def _function_text(target: Any) -> str:
    if isinstance(target, str):
        return target
    # Operators have their full name as text; other functions a name and a module.
    return str(target) if isinstance(target, torch._ops.OperatorBase) else f"{target.__module__}.{target.__qualname__}"


def _text(argument: Any) -> str:
    """Text of a node's arguments that is equal for equal arguments only."""
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, Mapping):
        return "{" + ",".join(f"{name}={_text(one)}" for name, one in argument.items()) + "}"
    if isinstance(argument, list | tuple):
        brackets = "[]" if isinstance(argument, list) else "()"
        return brackets[0] + ",".join(map(_text, argument)) + brackets[1]
    return repr(plain_json(argument))


def _type_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
    return repr(plain_json(value))


def _tensor_parts(tensor: torch.Tensor) -> Iterator[bytes | memoryview]:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ArtifactError("A constant cannot be saved", why=f"it is {tensor.layout} on {tensor.device}")
    yield f" {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}\n".encode()
    if tensor.numel():
        yield tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
