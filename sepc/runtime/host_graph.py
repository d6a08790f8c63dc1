"""The graph of a region that PyTorch runs, as data: a list of operators, of which each reads earlier values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch._ops import OpOverload

from sepc.errors import ArtifactError
from sepc.runtime.records import Value

Function = Callable[..., Any]

GETITEM = "getitem"
# Namespaces of operators that a file may name, and the package that registers them.
NAMESPACES = {"aten": "torch", "torchvision": "torchvision"}


@dataclass(frozen=True)
class HostOp:
    """One operator and its arguments: `Value`s, plain values, and lists and tuples of these."""

    function: Function
    args: tuple[object, ...]
    kwargs: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class HostGraph:
    """Operators in the order in which they run.

    Attributes:
        inputs: the number of tensors that the graph is called with.
        constants: tensors of its own.
        ops: the operators.
        result: what it returns: a `Value`, or a list or tuple of them.
    """

    inputs: int
    constants: tuple[torch.Tensor, ...]
    ops: tuple[HostOp, ...]
    result: object

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The graph's result for its inputs."""
        values: list[Any] = [*inputs, *self.constants]
        for op, dead in zip(self.ops, self._dead_after, strict=True):
            kwargs = {name: _filled(argument, values) for name, argument in op.kwargs.items()}
            values.append(op.function(*[_filled(argument, values) for argument in op.args], **kwargs))
            for index in dead:
                values[index] = None  # Its memory may go before the next operator asks for some.
        return _filled(self.result, values)

    @cached_property
    def _dead_after(self) -> list[list[int]]:
        """Per operator the values that nobody reads after it."""
        last: dict[int, int] = {}
        for number, op in enumerate(self.ops):
            last.update(dict.fromkeys(_indices((*op.args, *op.kwargs.values())), number))
            last.setdefault(self.inputs + len(self.constants) + number, number)
        kept = set(_indices(self.result))
        dead: list[list[int]] = [[] for _ in self.ops]
        for index, number in last.items():
            if index not in kept:
                dead[number].append(index)
        return dead

    def require_earlier_values(self) -> None:
        """Nothing, if every operator reads only values that there are when it runs; else raises ValueError."""
        known = self.inputs + len(self.constants)
        for number, op in enumerate(self.ops):
            if any(not 0 <= index < known + number for index in _indices((*op.args, *op.kwargs.values()))):
                raise ValueError(f"operator {number} of a graph reads a value that there is not yet")
        if any(not 0 <= index < known + len(self.ops) for index in _indices(self.result)):
            raise ValueError("a graph returns a value that there is not")


def name_of(function: Function) -> str:
    """What a file calls an operator, such as ``aten.topk.default``; raises ArtifactError if it may not name it."""
    if function is operator.getitem:
        return GETITEM
    if isinstance(function, OpOverload) and function.namespace in NAMESPACES:
        return str(function)
    raise ArtifactError(
        f"The operator {function} cannot be saved",
        why=f"a file may name operators of {' and '.join(NAMESPACES)} only",
        fix="compile the model in each process, or compute this part outside of it",
    )


def function_of(name: str) -> Function:
    """The operator that a file calls `name`; raises ArtifactError if there is none, or a file may not name it."""
    if name == GETITEM:
        return operator.getitem
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = None
    if namespace in NAMESPACES:
        import importlib

        importlib.import_module(NAMESPACES[namespace])  # One of two names; it registers the operators.
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, OpOverload) or str(found) != name:
        raise ArtifactError(
            f"There is no operator {name!r}",
            why=f"this is PyTorch {torch.__version__}; a file may name operators of {' and '.join(NAMESPACES)} only",
            fix="load the file with the version of PyTorch that saved it",
        )
    return found


def _filled(template: Any, values: list[Any]) -> Any:
    """An argument with its `Value`s replaced."""
    if isinstance(template, Value):
        return values[template.index]
    if isinstance(template, list | tuple):
        filled = [_filled(one, values) for one in template]
        return filled if isinstance(template, list) else tuple(filled)
    return template


def _indices(template: Any) -> list[int]:
    """The values that an argument contains."""
    if isinstance(template, Value):
        return [template.index]
    if isinstance(template, list | tuple):
        return [index for one in template for index in _indices(one)]
    if isinstance(template, Mapping):
        return _indices(list(template.values()))
    return []
