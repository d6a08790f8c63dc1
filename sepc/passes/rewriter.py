"""What rewriting passes are made of: rules, rejections with their reasons, and the rewriter, which builds nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sepc.errors import VerificationError
from sepc.ir.origin import derive
from sepc.ir.printer import describe_type
from sepc.ir.types import fake_mode, infer, same_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload
    from torch.fx.node import Argument

    from sepc.passes.manager import PassContext


@dataclass(frozen=True)
class Rejection:
    """Why a rule does not apply; `near`: the node looks like its pattern, so the reason is worth a note."""

    reason: str
    near: bool = True


@dataclass
class Rewriter:
    """Builds typed nodes in front of `anchor`, the node to be replaced; remembers them, so that they can be undone."""

    graph_module: fx.GraphModule
    pass_name: str
    mode: FakeTensorMode
    anchor: fx.Node
    origins: tuple[fx.Node, ...]
    created: list[fx.Node] = field(default_factory=list)

    def call(self, target: OpOverload, *args: Argument, **kwargs: Argument) -> fx.Node:
        """A call of `target`; raises VerificationError if it does not accept its inputs."""
        with self.graph_module.graph.inserting_before(self.anchor):
            name = target._schema.name.rpartition(":")[2]
            return self._typed(self.graph_module.graph.create_node("call_function", target, args, dict(kwargs), name))

    def constant(self, hint: str, value: torch.Tensor) -> fx.Node:
        """A new constant of the module, named after `hint`."""
        name, count = hint, 0
        while hasattr(self.graph_module, name):
            count += 1
            name = f"{hint}_{count}"
        self.graph_module.register_buffer(name, value)
        with self.graph_module.graph.inserting_before(self.anchor):
            return self._typed(self.graph_module.graph.get_attr(name))

    @property
    def description(self) -> str:
        """What is built in place of what, by operators."""
        built = [_operator(node) for node in self.created if node.op == "call_function"]
        return f"{_operator(self.anchor)} → {', '.join(built) or ('constant' if self.created else 'its input')}"

    def undo(self) -> None:
        """Erase all nodes built so far."""
        for node in reversed(self.created):
            self.graph_module.graph.erase_node(node)
        self.created.clear()

    def _typed(self, node: fx.Node) -> fx.Node:
        self.created.append(node)
        node.meta["val"] = infer(self.graph_module, node, self.mode)
        node.meta["sepc_origin"] = derive(self.pass_name, self.origins)
        return node


def _operator(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


Match = TypeVar("Match")


class Rule(ABC, Generic[Match]):
    """The unit of rewriting: `match` finds out whether it applies, `rewrite` builds the replacement."""

    targets: tuple[object, ...]
    """What the nodes call that `match` wants to see."""

    @abstractmethod
    def match(self, node: fx.Node, module: fx.GraphModule) -> Match | Rejection | None:
        """What `rewrite` needs; a rejection with its reason; or None where `node` is not of the pattern at all."""

    @abstractmethod
    def rewrite(self, match: Match, build: Rewriter) -> fx.Node:
        """Build what replaces the node, and return it."""

    def apply(self, node: fx.Node, pass_name: str, module: fx.GraphModule, context: PassContext) -> bool:
        """Replace `node` if the rule matches, and note that, or the reason if not; returns whether it was replaced."""
        found = self.match(node, module)
        if found is None:
            return False
        if isinstance(found, Rejection):
            context.note(pass_name, node, found.reason)
            return False
        build = Rewriter(module, pass_name, fake_mode(module), node, (node,))
        rejection = replace(node, build, lambda: self.rewrite(found, build))
        context.note(pass_name, node, rejection.reason if rejection else build.description, taken=rejection is None)
        return rejection is None


def replace(node: fx.Node, build: Rewriter, rewrite: Callable[[], fx.Node]) -> Rejection | None:
    """Replace `node` by what `rewrite` builds; undone, with the reason, where that has another type or does not fit."""
    try:
        new = rewrite()
    except VerificationError as error:
        build.undo()
        return Rejection(error.why)
    before, after = node.meta["val"], new.meta["val"]
    if not same_type(before, after):
        build.undo()
        return Rejection(f"its type would change from {describe_type(before)} to {describe_type(after)}")
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return None
