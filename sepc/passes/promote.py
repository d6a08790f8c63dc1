"""promote: what a model computes in float16 or bfloat16 is computed in float32, and rounded where that can be seen.

Pattern. A call of an operator f with operands or results of a *half* type, float16 or bfloat16.

Equation. With w the conversion to float32, which is exact, and r the rounding to the half type, eager PyTorch computes
yᵢ = r(f(w(x₁), …)) for nearly every f. Here wᵢ = f(w₁, …) is kept in float32 instead of yᵢ, so the result is that of
eager without the rounding errors in between: nearer to the real numbers, and within the half type's tolerance.

    %x (float16)                               %x (float16)
    %c = conv2d(%x, %weight, %bias)            %w = _to_copy(%x, dtype=float32)
    %r = relu(%c)                       →      %c = conv2d(%w, %weight_float32, %bias_float32)
    return %r                                  %r = relu(%c)
                                               %h = _to_copy(%r, dtype=float16)
                                               return %h

Values are rounded where the model can tell: results of the graph; conversions to a half type that the model itself
makes of another type; operands of an operator with a result that is not floating (a comparison, an index, a
conversion to integers), so that what is equal in eager is equal here. Constants are converted once, and take the
memory of float32 from then on. Views of inputs stay views.

Preconditions. In float32, f has results of the same shapes and strides, float32 for the half type and no other change.
Where that does not hold (reinterpreted bits, complex halves), where f is random, and where it makes halves of what is
no half, f stays as it is, on rounded operands; the note says so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from sepc.errors import VerificationError
from sepc.ir import ops
from sepc.ir.origin import derive
from sepc.ir.types import fake_mode, infer, same_type
from sepc.ir.views import is_view
from sepc.passes.manager import PassContext
from sepc.passes.rewriter import Rewriter

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
# Their results are views.
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)


@dataclass(frozen=True)
class Promote:
    """The pass."""

    name: ClassVar[str] = "promote"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module` to compute in float32 instead of in halves; returns whether there were any."""
        nodes = list(graph_module.graph.nodes)
        if not any(_halves(node.meta.get("val")) for node in nodes):
            return False
        run = _Run(graph_module, self.name, {node: node.meta.get("val") for node in nodes})
        for node in nodes:
            reason = run.visit(node)
            if reason:
                context.note(self.name, node, reason)
        return True


def _halves(value: Any) -> bool:
    return any(isinstance(one, torch.Tensor) and one.dtype in HALVES for one in pytree.tree_leaves(value))


@dataclass
class _Run:
    """One run of the pass.

    Attributes:
        declared: the types that the model gives its values.
        wide: the float32 form of values of a half type. narrow: their form in the half type itself.
    """

    graph_module: fx.GraphModule
    pass_name: str
    declared: dict[fx.Node, Any]
    wide: dict[fx.Node, fx.Node] = field(default_factory=dict)
    narrow: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> str:
        """Rewrite `node`, whose operands have been visited; returns why it stays in a half type where it does."""
        given = [value for value in node.all_input_nodes if _halves(self.declared[value])]
        if node.op == "output":
            self._narrow_arguments(node)
        elif node.op != "call_function":
            self.narrow[node] = node
        elif not given:
            self.narrow[node] = node  # It makes halves of something else: that rounds.
        elif node.target is operator.getitem:
            self._take(node, given[0])
        elif (_gives_views(node) and given[0] in self.narrow) or self._changes_half_type(node, given[0]):
            self._narrow_arguments(node)
        else:
            return self._promote(node)
        return ""

    def _take(self, node: fx.Node, source: fx.Node) -> None:
        """`node` takes one of several results, which are as `source` computes them."""
        node.meta["val"] = source.meta["val"][node.args[1]]
        forms = self.wide if source in self.wide else self.narrow
        forms[node] = node

    def _changes_half_type(self, node: fx.Node, source: fx.Node) -> bool:
        result = self.declared[node]
        return (
            ops.is_op(node, aten._to_copy.default) and _halves(result) and result.dtype != self.declared[source].dtype
        )

    def _promote(self, node: fx.Node) -> str:
        """Have `node` compute in float32, if it computes the same there."""
        assert isinstance(node.target, OpOverload)
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            self._narrow_arguments(node)
            return f"{node.target} stays as it is: it is random"
        results = [one for one in pytree.tree_leaves(self.declared[node]) if isinstance(one, torch.Tensor)]
        rounds = not all(one.is_floating_point() for one in results)
        args, kwargs = node.args, node.kwargs
        before = node.meta["val"]
        self._map(node, lambda value: self._rounded(value, node) if rounds else self._widened(value, node))
        node.args, node.kwargs = pytree.tree_map(_float32, (node.args, node.kwargs), is_leaf=_is_leaf)
        try:
            node.meta["val"] = infer(self.graph_module, node, fake_mode(self.graph_module))
            reason = "" if _alike(before, node.meta["val"]) else "its type in float32 is another"
        except VerificationError as error:
            reason = error.why
        if reason:
            node.args, node.kwargs, node.meta["val"] = args, kwargs, before
            self._narrow_arguments(node)
            return f"{node.target} stays as it is: {reason}"
        self.wide[node] = node
        return ""

    def _narrow_arguments(self, node: fx.Node) -> None:
        """Give `node` its operands in their half types."""
        self._map(node, lambda value: self._narrowed(value, node))
        if node.op != "output":
            self.narrow[node] = node

    def _map(self, node: fx.Node, form: Callable[[fx.Node], fx.Node]) -> None:
        def replaced(value: fx.Node) -> fx.Node:
            return form(value) if _halves(self.declared.get(value)) else value

        node.args, node.kwargs = fx.map_arg(node.args, replaced), fx.map_arg(node.kwargs, replaced)

    # ---- the two forms of a value, each made where it is first asked for

    def _widened(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        if value not in self.wide:
            build = self._build(value, reader)
            if ops.is_constant(value):
                wide = build.constant(f"{value.target}_float32", ops.constant(self.graph_module, value).float())
            elif _is_view(value):
                wide = self._viewed(value, reader, self._widened)
            else:
                wide = build.call(aten._to_copy.default, value, dtype=torch.float32)
            self.wide[value] = wide
        return self.wide[value]

    def _narrowed(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        if value not in self.narrow:
            if _is_view(value):  # So that it has the strides, and shares the memory, that it has in eager.
                self.narrow[value] = self._viewed(value, reader, self._narrowed)
            else:
                half = self.declared[value].dtype
                self.narrow[value] = self._build(value, reader).call(
                    aten._to_copy.default, self.wide[value], dtype=half
                )
        return self.narrow[value]

    def _viewed(self, value: fx.Node, reader: fx.Node, form: Callable[[fx.Node, fx.Node], fx.Node]) -> fx.Node:
        """The view `value`, but of that form of its source."""
        viewing = value.all_input_nodes[0] if value.target is operator.getitem else value
        assert isinstance(viewing.target, OpOverload)
        source = form(viewing.all_input_nodes[0], reader)
        view = self._build(value, reader).call(viewing.target, source, *viewing.args[1:], **viewing.kwargs)
        if viewing is value:
            return view
        with self.graph_module.graph.inserting_before(reader):
            part = self.graph_module.graph.call_function(operator.getitem, (view, value.args[1]))
        part.meta.update(val=view.meta["val"][value.args[1]], sepc_origin=derive(self.pass_name, (value,)))
        return part

    def _rounded(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        """`value` in float32, but rounded to its half type."""
        if self.narrow.get(value) is value:
            return self._widened(value, reader)  # Nothing of it was ever computed in float32.
        return self._build(value, reader).call(
            aten._to_copy.default, self._narrowed(value, reader), dtype=torch.float32
        )

    def _build(self, value: fx.Node, reader: fx.Node) -> Rewriter:
        return Rewriter(self.graph_module, self.pass_name, fake_mode(self.graph_module), reader, (value,))


def _gives_views(node: fx.Node) -> bool:
    return is_view(node) or ops.is_op(node, *_SPLITS)


def _is_view(node: fx.Node) -> bool:
    """Whether `node` is a view of a tensor, if only one of several that an operator gives."""
    return is_view(node) or (node.target is operator.getitem and ops.is_op(node.args[0], *_SPLITS))


def _is_leaf(argument: Any) -> bool:
    return isinstance(argument, torch.dtype | fx.Node)


def _float32(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in HALVES else argument


def _alike(declared: Any, promoted: Any) -> bool:
    """Whether types are equal but for float32 instead of halves."""
    pairs = zip(pytree.tree_leaves(declared), pytree.tree_leaves(promoted), strict=True)
    return all(same_type(_in_float32(before), after) for before, after in pairs)


def _in_float32(declared: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(declared.shape, declared.stride(), dtype=_float32(declared.dtype), device="meta")
