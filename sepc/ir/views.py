"""View operators: they move no data, they only change a tensor's shape, strides and offset."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.errors import VerificationError

aten = torch.ops.aten

VIEWS: frozenset[OpOverload] = frozenset(
    {
        aten.view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.alias.default,
        aten.detach.default,
        aten.diagonal.default,
        aten.unfold.default,
    }
)


def is_view(node: fx.Node) -> bool:
    """Whether `node` only looks at its input in another way."""
    return node.op == "call_function" and node.target in VIEWS


def view_layout(
    node: fx.Node, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], int] | None:
    """Strides and offset of the view `node` of an input with `shape`, `strides` and `offset` (in elements).

    None where no such view exists and the data must be copied first. PyTorch itself decides, on a tensor without data.
    """
    if not isinstance(node.target, OpOverload):
        raise VerificationError("Not a view", where=node.name, why=f"it calls {node.target}")
    source = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    arguments = [source if argument is node.all_input_nodes[0] else argument for argument in node.args]
    try:
        view = node.target(*arguments, **node.kwargs)
    except RuntimeError:
        return None
    return tuple(view.stride()), offset + int(view.storage_offset())
