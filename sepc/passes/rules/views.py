"""Reshapes and transpositions: one spelling of each, and chains of them in one.

Pattern and equation.

    reshape, flatten, unflatten, squeeze, unsqueeze    →    view with explicit sizes
    view(view(x, s), t)                                →    view(x, t)
    transpose(x, i, j), t(x)                           →    permute(x, order)
    permute(permute(x, p), q)                          →    permute(x, p ∘ q),  (p ∘ q)[d] = p[q[d]]

Preconditions. The strides of x allow the view; where they do not, a reshape is a copy, and stays one.
"""

from __future__ import annotations

from torch import fx

from sepc.ir.ops import Permute, arguments, aten, is_op, shape
from sepc.passes.rules.respell import Call, Respell

_RESHAPES = (
    *(aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.view.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)


def _as_view(node: fx.Node, module: fx.GraphModule) -> Call | None:
    source, sizes = arguments(node)["self"], list(shape(node))
    if is_op(node, aten.view.default):
        inner = is_op(source, aten.view.default)
        if not inner and list(arguments(node)["size"]) == sizes:
            return None
        source = arguments(source)["self"] if inner else source
    return aten.view.default, (source, sizes)


def _as_permute(node: fx.Node, module: fx.GraphModule) -> Call | None:
    if Permute.matches(node):
        outer = Permute.of(node)
        if not Permute.matches(outer.input):
            return None
        inner = Permute.of(outer.input)
        return aten.permute.default, (inner.input, [inner.dims[dim] for dim in outer.dims])
    named, order = arguments(node), list(range(len(shape(node))))
    first, second = named.get("dim0", 0), named.get("dim1", -1)
    if order:
        order[first], order[second] = order[second], order[first]
    return aten.permute.default, (named["self"], order)


AS_VIEW = Respell(_RESHAPES, _as_view)
AS_PERMUTE = Respell((*Permute.targets, aten.transpose.int, aten.t.default), _as_permute)
