"""Operators with several results, of which one is taken: an operator with that one result.

Pattern and equation.

    split(x, sizes, dim)[i], chunk(x, n, dim)[i]    →    slice(x, dim, Σ sizes[:i], Σ sizes[:i + 1])
    unbind(x, dim)[i]                               →    select(x, dim, i)
    _native_batch_norm_legit_no_training(x, …)[0]   →    batch_norm(x, …)
    native_layer_norm(x, …)[0]                      →    layer_norm(x, …)
    max_pool2d_with_indices(x, …)[0]                →    max_pool2d(x, …);      max_pool3d alike

Preconditions. None beyond the pattern: the other results stay where they are, and are dead code if nobody reads them.
"""

from __future__ import annotations

import operator

from torch import fx
from torch._ops import OpOverload

from sepc.ir.ops import arguments, aten, is_op, shape
from sepc.passes.rules.respell import Call, Respell

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def _as_slice(node: fx.Node, module: fx.GraphModule) -> Call | None:
    split, index = node.args
    if not isinstance(split, fx.Node) or not is_op(split, *_SPLITS) or not isinstance(index, int):
        return None
    named = arguments(split)
    dim = named["dim"] % len(shape(named["self"]))
    sizes = [part.shape[dim] for part in split.meta["val"]]
    start = sum(sizes[: index % len(sizes)])
    return aten.slice.Tensor, (named["self"], dim, start, start + sizes[index])


def _as_selection(node: fx.Node, module: fx.GraphModule) -> Call | None:
    unbind, index = node.args
    if not isinstance(unbind, fx.Node) or not is_op(unbind, aten.unbind.int) or not isinstance(index, int):
        return None
    named = arguments(unbind)
    return aten.select.int, (named["self"], named["dim"], index)


def _as_one_output(node: fx.Node, module: fx.GraphModule) -> Call | None:
    source, index = node.args
    if index != 0 or not isinstance(source, fx.Node) or not isinstance(source.target, OpOverload):
        return None
    named = arguments(source)
    if is_op(source, aten._native_batch_norm_legit_no_training.default):
        names = ("input", "weight", "bias", "running_mean", "running_var")
        return aten.batch_norm.default, (*map(named.get, names), False, named["momentum"], named["eps"], False)
    if is_op(source, aten.native_layer_norm.default):
        return aten.layer_norm.default, tuple(map(named.get, ("input", "normalized_shape", "weight", "bias", "eps")))
    if is_op(source, aten.max_pool2d_with_indices.default):
        return aten.max_pool2d.default, tuple(named.values())
    if is_op(source, aten.max_pool3d_with_indices.default):
        return aten.max_pool3d.default, tuple(named.values())
    return None


AS_SLICE = Respell((operator.getitem,), _as_slice)
AS_SELECTION = Respell((operator.getitem,), _as_selection)
AS_ONE_RESULT = Respell((operator.getitem,), _as_one_output)
