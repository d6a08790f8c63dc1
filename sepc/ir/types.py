"""Types of nodes: what ``meta["val"]`` holds, computed as PyTorch computes it, on tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sepc.errors import VerificationError

# Of their results PyTorch before 2.15 says, without data, that they are contiguous, whatever they are made of.
_KEEP_MEMORY_FORMAT = (torch.ops.aten.group_norm.default,)


def fake_mode(graph_module: fx.GraphModule) -> FakeTensorMode:
    """The FakeTensorMode of the graph's types; a new one for a graph without types."""
    values = (node.meta.get("val") for node in graph_module.graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None) or FakeTensorMode()


def propagate_types(graph_module: fx.GraphModule, mode: FakeTensorMode | None = None) -> None:
    """Compute ``meta["val"]`` of all nodes afresh from the placeholders' types and the constants, also inside regions.

    Raises VerificationError, naming the node, where an operator does not accept its inputs.
    """
    mode = mode or fake_mode(graph_module)
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_function"):
            node.meta["val"] = infer(graph_module, node, mode)
        elif node.op == "call_module":
            region = getattr(graph_module, str(node.target), None)
            if not isinstance(region, fx.GraphModule):
                continue  # `verify` reports it.
            for placeholder, value in zip(region.graph.find_nodes(op="placeholder"), node.args, strict=True):
                placeholder.meta["val"] = value.meta["val"] if isinstance(value, fx.Node) else value
            propagate_types(region, mode)
            node.meta["val"] = fx.map_arg(region.graph.output_node().args[0], lambda result: result.meta["val"])


def infer(graph_module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> object:
    """The type of a ``get_attr`` or ``call_function`` `node` whose inputs are typed; raises VerificationError."""
    try:
        if node.op == "get_attr":
            return mode.from_tensor(getattr(graph_module, str(node.target)), static_shapes=True)
        if not callable(node.target):
            raise TypeError(f"{node.target!r} cannot be called")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: value.meta["val"])
        with mode, torch.no_grad():
            result = node.target(*args, **kwargs)
            return _laid_out_as_by_eager(result, *args) if node.target in _KEEP_MEMORY_FORMAT else result
    except Exception as error:  # Operators refuse what they do not take by errors of any class.
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VerificationError(
            "A node does not fit its inputs", where=f"{node.name} = {node.target}", why=why
        ) from error


def _laid_out_as_by_eager(result: torch.Tensor, given: Any, *_: object) -> torch.Tensor:
    """`result` in the memory format of `given`, the first argument."""
    return torch.empty_like(result, memory_format=suggest_memory_format(given))


def same_type(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether shape, dtype and the strides that matter (of dimensions larger than 1) are equal."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    triples = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(size <= 1 or one == other for size, one, other in triples)
