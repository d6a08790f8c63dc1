"""The simplest kind of rule: one ATen call for another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload

from sepc.passes.rewriter import Rejection, Rewriter, Rule

Call = tuple[OpOverload, tuple[Any, ...]]
Spelling = Callable[[fx.Node, fx.GraphModule], Call | Rejection | None]


@dataclass(frozen=True)
class Respell(Rule[Call]):
    """One call for another: `spelling` gives the other call of a node that calls one of `targets`."""

    targets: tuple[object, ...]
    spelling: Spelling

    def match(self, node: fx.Node, module: fx.GraphModule) -> Call | Rejection | None:
        return self.spelling(node, module)

    def rewrite(self, match: Call, build: Rewriter) -> fx.Node:
        target, args = match
        return build.call(target, *args)
