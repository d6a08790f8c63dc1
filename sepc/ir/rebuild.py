"""What the programs that `sepc.ir.script` writes call: it builds the graph that they were written for.

The printed function `forward` is recorded as it runs: operators as nodes, under the names of the variables that hold
their results, and functions with the decorator `region` as submodules.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.overrides import TorchFunctionMode

from sepc.errors import InputError
from sepc.ir.types import propagate_types


def stand_in(dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None) -> torch.Tensor:
    """Numbers in place of others of that type, the same each time.

    Those of floating point are positive, as variances have to be, and so small that sums of products stay finite
    through many layers; the others are 0, which any index may be.
    """
    kind: torch.dtype = getattr(torch, dtype)
    plain = torch.zeros(tuple(shape), dtype=kind)
    made = plain if strides is None else torch.empty_strided(tuple(shape), tuple(strides), dtype=kind)
    if not (kind.is_floating_point or kind.is_complex):
        return made.copy_(plain)
    summands = max(plain[0].numel(), 1) if plain.dim() > 1 else 1
    generator = torch.Generator().manual_seed(0)
    return made.copy_((1 - torch.rand(tuple(shape), generator=generator)) / summands)


def region(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a region of the graph that is being built; with plain tensors it just computes."""

    @wraps(function)
    def call(module: object, *arguments: Any) -> Any:
        return module.call(function, arguments) if isinstance(module, _Module) else function(module, *arguments)

    return call


def build(
    forward: Callable[..., Any], inputs: Sequence[torch.Tensor], constants: Mapping[str, torch.Tensor]
) -> fx.GraphModule:
    """The graph of `forward`, a function that `print_graph` has printed, with typed nodes.

    Args:
        forward: a function of the module and of tensors.
        inputs: tensors of the types of those.
        constants: by name; those of a region have its name and a point in front.

    Raises:
        InputError: there are more inputs than `forward` takes, or fewer.
    """
    names = [*inspect.signature(forward).parameters][1:]
    if len(names) != len(inputs):
        raise InputError(f"There are {len(inputs)} inputs", where=forward.__name__, why=f"it takes {', '.join(names)}")
    graph_module = _Module(constants).record(forward)
    mode = FakeTensorMode()
    for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    propagate_types(graph_module, mode)
    return graph_module


class _Module:
    """What a function that is recorded has as its module: attributes are constants, or the modules of regions."""

    def __init__(self, constants: Mapping[str, torch.Tensor], prefix: str = "", outer: _Module | None = None) -> None:
        self._constants, self._prefix, self._outer = constants, prefix, outer
        self._root, self._graph = nn.Module(), fx.Graph()
        self._tracer = GraphAppendingTracer(self._graph)

    def __getattr__(self, name: str) -> Any:
        """A constant, which is a node from now on, or the module of the region of that name."""
        path = self._prefix + name
        if path not in self._constants:
            return _Module(self._constants, f"{path}.", self)
        setattr(self._root, name, self._constants[path])
        return Proxy(self._graph.get_attr(name), self._tracer)

    def record(self, function: Callable[..., Any]) -> fx.GraphModule:
        """What `function` computes, as a graph."""
        names = [*inspect.signature(function).parameters][1:]
        arguments = [Proxy(self._graph.placeholder(name), self._tracer) for name in names]
        with _Recording(self._tracer), _variables_of(function) as variables:
            result = function(self, *arguments)
        self._graph.output(self._tracer.create_arg(result))
        return fx.GraphModule(self._root, _renamed(self._graph, variables))

    def call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Proxy:
        """`function` as a submodule of the module around this one, and a call of it with `arguments`."""
        assert self._outer is not None
        name = self._prefix.removesuffix(".").rpartition(".")[2]
        self._outer._root.add_module(name, self.record(function))
        return self._outer._tracer.create_proxy("call_module", name, tuple(arguments), {})


class _Recording(TorchFunctionMode):
    """While this is on, operators are not computed, but nodes."""

    def __init__(self, tracer: GraphAppendingTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(function, OpOverload):
            return self._tracer.create_proxy("call_function", function, args, kwargs or {})
        return function(*args, **(kwargs or {}))  # Such as `torch.device`.


@contextmanager
def _variables_of(function: Callable[..., Any]) -> Iterator[dict[fx.Node, str]]:
    """The nodes that variables of `function` hold when it returns, with their names; known at the end of the block."""
    names: dict[fx.Node, str] = {}
    code, before = getattr(function, "__code__", None), sys.getprofile()

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_code is code:
            names.update((value.node, name) for name, value in frame.f_locals.items() if isinstance(value, Proxy))

    sys.setprofile(look)
    try:
        yield names
    finally:
        sys.setprofile(before)


def _renamed(graph: fx.Graph, names: Mapping[fx.Node, str]) -> fx.Graph:
    """A copy in which nodes have these names."""
    renamed, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        copies[node] = renamed.create_node(node.op, node.target, args, kwargs, names.get(node, node.name))
    return renamed
