"""What does not depend on the inputs is computed once, at compile time; a part of canonicalize.

Pattern. A node whose inputs are constants, or nodes of that kind, read by one that depends on an input, or a result.

Equation. f(constants) is a constant.

Preconditions. The operator is not random, and has one result. An expansion is not far larger than what it is made of,
since kernels read the small tensor as well as the large; what takes computing may be large, but not beyond all measure.
Else the inputs are folded instead, and the note says so.

    add(%x, exp(%vector))    →    add(%x, %folded_exp)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.ir.ops import constant
from sepc.ir.types import fake_mode
from sepc.ir.views import is_view
from sepc.passes.manager import PassContext
from sepc.passes.rewriter import Rejection, Rewriter, replace


class ConstantFolder:
    """Replaces by constants the nodes that depend on no input, and are read by a node that does."""

    def __init__(self, graph_module: fx.GraphModule, pass_name: str, limits_bytes: tuple[int, int]) -> None:
        self.graph_module, self.pass_name = graph_module, pass_name
        self.view_limit_bytes, self.computed_limit_bytes = limits_bytes
        self.values: dict[fx.Node, Any] = {}
        self.leaves: dict[fx.Node, frozenset[fx.Node]] = {}

    def run(self, context: PassContext) -> bool:
        """Fold; returns whether a node was replaced."""
        self._evaluate()
        changed = False
        wanted = {node for node in self.values if any(user not in self.values for user in node.users)}
        for node in reversed(self.values):
            if node not in wanted or node.op == "get_attr":
                continue
            rejection = self._rejection(node) or self._replace(node)
            changed |= rejection is None
            message = rejection.reason if rejection else "computed at compile time"
            context.note(self.pass_name, node, message, taken=rejection is None)
            if rejection is not None:
                wanted.update(node.all_input_nodes)
        return changed

    def _evaluate(self) -> None:
        for node in self.graph_module.graph.nodes:
            if node.op == "get_attr":
                self.values[node], self.leaves[node] = constant(self.graph_module, node), frozenset((node,))
            elif self._is_foldable(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
                with torch.no_grad():
                    self.values[node] = node.target(*args, **kwargs)
                self.leaves[node] = frozenset().union(*(self.leaves[source] for source in node.all_input_nodes))

    def _is_foldable(self, node: fx.Node) -> bool:
        if node.op != "call_function" or not all(source in self.values for source in node.all_input_nodes):
            return False
        return not (isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags)

    def _rejection(self, node: fx.Node) -> Rejection | None:
        value = self.values[node]
        if not isinstance(value, torch.Tensor):
            return Rejection("it has several outputs")
        made_of = sum(self.values[leaf].numel() * self.values[leaf].element_size() for leaf in self.leaves[node])
        size = value.numel() * value.element_size()
        limit = self.view_limit_bytes if is_view(node) else self.computed_limit_bytes
        if size <= max(limit, 2 * made_of):
            return None
        return Rejection(f"the constant would have {size} bytes, and is made of {made_of}")

    def _replace(self, node: fx.Node) -> Rejection | None:
        build = Rewriter(self.graph_module, self.pass_name, fake_mode(self.graph_module), node, (node,))
        name, value = f"folded_{node.name}", self.values[node]
        # A copy if its strides do: the value may be a view of a larger constant, and would keep it alive.
        copied = replace(node, build, lambda: build.constant(name, value.clone()))
        return copied and replace(node, build, lambda: build.constant(name, value))
