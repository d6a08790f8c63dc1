"""demote: what stages of ours compute in float32 is computed in float16, where the target is asked for that.

Pattern. A call of an operator f with a result in float32, for which there is a stage of ours (`sepc.passes.group`), or
a view of what has become float16.

Equation. With h the rounding to float16, hᵢ = f(h(x₁), …) is kept in float16 instead of xᵢ: half the bytes, and twice
the numbers in a vector. An error of 2⁻¹¹ of each value is accepted; how f itself computes is for the stage to say (sums
of products in blocks that are added in float32; means, variances, softmax and polynomials in float32).

    %x (float32)                               %x (float32)
    %c = conv2d(%x, %weight, %bias)            %h = _to_copy(%x, dtype=float16)
    %r = relu(%c)                       →      %c = conv2d(%h, %weight_float16, %bias_float16)
    return %r                                  %r = relu(%c)
                                               %w = _to_copy(%r, dtype=float32)
                                               return %w

What the caller gives and gets keeps its types, and so does what TVM or PyTorch computes: its operands are converted to
float32, and its results back where a stage of ours reads them. Conversions are elementwise operators, which `group` and
`fuse` put into the kernels beside them. Those of a model in float16 itself meet those that `promote` made, and both go.

Preconditions. The constants that f reads keep their digits: each is rounded by at most 2⁻¹⁰ of the largest. That fails
where they are too large for float16, or all of them tiny; the note says so, and f stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.errors import VerificationError
from sepc.ir import ops
from sepc.ir.element import FLOAT16
from sepc.ir.types import fake_mode, infer
from sepc.ir.views import is_view
from sepc.passes.group import classify, padded_convolution
from sepc.passes.manager import PassContext
from sepc.passes.rewriter import Rewriter

aten = torch.ops.aten
ROUNDING: Final = 2.0**-10
"""What a constant may lose, relative to the largest beside it."""


@dataclass(frozen=True)
class Demote:
    """The pass."""

    name: ClassVar[str] = "demote"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module` to compute in the context's type; returns whether anything is another type now."""
        if context.element != FLOAT16:
            return False
        run = _Run(graph_module, self.name, context)
        for node in list(graph_module.graph.nodes):
            if reason := run.visit(node):
                context.note(self.name, node, f"stays float32: {reason}")
        for node, narrow in run.replacements.items():
            node.replace_all_uses_with(narrow)
        if run.count:
            message = f"{run.count} operators compute in float16"
            context.note(self.name, graph_module.graph.output_node(), message, taken=True)
        return run.count > 0


def _type(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


@dataclass
class _Run:
    """One run of the pass.

    Attributes:
        declared: the types that the graph gave its values. viewed: what each view looks at.
        narrow: the float16 form of values declared as float32. wide: their form in float32.
        rounded: those of which float16 holds all there is.
        replacements: conversions to float16 of what is float16 now, and that. count: operators that are float16 now.
    """

    graph_module: fx.GraphModule
    pass_name: str
    context: PassContext
    narrow: dict[fx.Node, fx.Node] = field(default_factory=dict)
    wide: dict[fx.Node, fx.Node] = field(default_factory=dict)
    rounded: set[fx.Node] = field(default_factory=set)
    replacements: dict[fx.Node, fx.Node] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        nodes = self.graph_module.graph.nodes
        self.declared = {node: _type(node) for node in nodes}
        self.viewed = {node: node.all_input_nodes[0] for node in nodes if is_view(node)}

    def visit(self, node: fx.Node) -> str:
        """Rewrite `node`, whose operands have been visited; returns why it stays in float32 where a note is due."""
        if node.op in ("placeholder", "get_attr"):
            self.wide[node] = node
        elif self._is_conversion(node, torch.float16, torch.float32):
            self.narrow[node], self.wide[node] = node.all_input_nodes[0], node
            self.rounded.add(node)
        elif self._is_conversion(node, torch.float32, torch.float16):
            self.replacements[node] = self._narrowed(node.all_input_nodes[0], node)
        elif node.op != "output" and self.declared[node] == torch.float32 and self._follows(node):
            return self._demote(node)
        else:
            self._map(node, self._widened)
            self.wide[node] = node
        return ""

    def _is_conversion(self, node: fx.Node, source: torch.dtype, result: torch.dtype) -> bool:
        converts = ops.is_op(node, aten._to_copy.default) and self.declared[node] == result
        return converts and self.declared[node.all_input_nodes[0]] == source

    def _follows(self, node: fx.Node) -> bool:
        """Whether `node` is for a stage of ours, or looks at what one has computed."""
        if is_view(node):
            return node.all_input_nodes[0] in self.rounded
        types = (torch.float32, torch.float16)
        return padded_convolution(node, types) is not None or classify(node, types).kernel == "sepc"

    def _demote(self, node: fx.Node) -> str:
        """Have `node` compute in float16, if its constants and its types allow it."""
        reason = next((why for one in node.all_input_nodes if (why := self._obstacle(one))), "")
        args, kwargs, before = node.args, node.kwargs, node.meta["val"]
        if not reason:
            self._map(node, self._narrowed)
            reason = self._retype(node, before)
        if reason:
            node.args, node.kwargs, node.meta["val"] = args, kwargs, before
            self._map(node, self._widened)
            self.wide[node] = node
            return reason
        self.narrow[node] = node
        self.rounded.add(node)
        self.count += not is_view(node)
        return ""

    def _obstacle(self, value: fx.Node) -> str:
        """Why the operand `value` cannot be float16; empty where it can."""
        if not ops.is_constant(value) or self.declared[value] != torch.float32 or value in self.narrow:
            return ""
        held = ops.constant(self.graph_module, value).detach()
        if not held.numel():
            return ""
        lost, largest = (held - held.half().float()).abs().max(), held.abs().max()
        return "" if lost <= ROUNDING * largest else f"'{value.target}' is out of float16's range"

    def _retype(self, node: fx.Node, before: torch.Tensor) -> str:
        """Find the type of `node` with its new operands; returns what is wrong with it."""
        try:
            value = infer(self.graph_module, node, fake_mode(self.graph_module))
        except VerificationError as error:
            return error.why
        alike = isinstance(value, torch.Tensor) and value.dtype == torch.float16 and value.shape == before.shape
        node.meta["val"] = value
        return "" if alike else "its type in float16 is another"

    def _map(self, node: fx.Node, form: Callable[[fx.Node, fx.Node], fx.Node]) -> None:
        """Give `node` its operands of float32 in that form."""

        def replaced(value: fx.Node) -> Any:
            return form(value, node) if self.declared.get(value) == torch.float32 else value

        node.args, node.kwargs = fx.map_arg(node.args, replaced), fx.map_arg(node.kwargs, replaced)

    # ---- the two forms of a value, each made where it is first asked for

    def _narrowed(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        if value not in self.narrow:
            build = self._build(value, reader)
            if ops.is_constant(value):
                held = ops.constant(self.graph_module, value).detach()
                self.narrow[value] = build.constant(f"{value.target}_float16", held.half())
            else:
                self.narrow[value] = build.call(aten._to_copy.default, value, dtype=torch.float16)
        return self.narrow[value]

    def _widened(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        if value not in self.wide:
            build = self._build(value, reader)
            if is_view(value) and isinstance(value.target, OpOverload):
                # So that it has the strides, and shares the memory, that it has in eager.
                source = self._widened(self.viewed[value], reader)
                self.wide[value] = build.call(value.target, source, *value.args[1:], **value.kwargs)
            else:
                self.wide[value] = build.call(aten._to_copy.default, value, dtype=torch.float32)
        return self.wide[value]

    def _build(self, value: fx.Node, reader: fx.Node) -> Rewriter:
        return Rewriter(self.graph_module, self.pass_name, fake_mode(self.graph_module), reader, (value,))
