"""From a call's arguments to the inputs of the captured graph."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sepc.errors import InputError
from sepc.frontend.export import Captured, finish
from sepc.ir import ops
from sepc.runtime.signature import Signature, TensorLeaf


def captured_for(exported: ExportedProgram, signature: Signature) -> tuple[Captured, tuple[int, ...]]:
    """The graph of a program for calls of that signature; with what `match_inputs` returns, and raises."""
    captured = finish(exported)
    return captured, match_inputs(captured, signature)


def match_inputs(captured: Captured, signature: Signature) -> tuple[int, ...]:
    """Per input of the graph the number of the argument's tensor that it takes; its type gets the strides of that.

    Raises InputError if an ExportedProgram was exported for other arguments.
    """
    leaves = [_stand_in(leaf) if isinstance(leaf, TensorLeaf) else leaf.value for leaf in signature.leaves]
    args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
    numbers = {id(leaf): number for number, leaf in enumerate(one for one in leaves if isinstance(one, torch.Tensor))}
    tensors = captured.flatten(args, kwargs)
    for node, tensor in zip(captured.graph_module.graph.find_nodes(op="placeholder"), tensors, strict=True):
        if ops.shape(node) != tuple(tensor.shape) or ops.dtype(node) != tensor.dtype:
            raise InputError(
                f"Input '{node.name}' is {tensor.dtype} of shape {tuple(tensor.shape)}",
                why=f"the program was exported for {ops.dtype(node)} of shape {ops.shape(node)}",
                fix="export the program for this input, or compile the module instead",
            )
        if ops.strides(node) != tensor.stride():
            node.meta["val"] = node.meta["val"].as_strided(tensor.shape, tensor.stride())
    return tuple(numbers[id(tensor)] for tensor in tensors)


def _stand_in(leaf: TensorLeaf) -> torch.Tensor:
    """A tensor of that type without memory."""
    if leaf.contiguous:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    batch, channels, *pixels = leaf.shape
    return torch.empty((batch, *pixels, channels), dtype=leaf.dtype, device="meta").movedim(-1, 1)
