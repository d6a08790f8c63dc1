"""drop-relu: ReLU of what is not negative is that itself.

    y = relu(x), where x is a result of relu, sigmoid, exp or abs   →   y = x

An identity of numbers, and of NaN, so that results stay the same bit by bit.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sepc.passes.manager import PassContext

aten = torch.ops.aten
NOT_NEGATIVE = (aten.relu.default, aten.sigmoid.default, aten.exp.default, aten.abs.default)


@dataclass(frozen=True)
class DropReLU:
    """The pass; `most` limits how many it drops."""

    name: ClassVar[str] = "drop-relu"
    most: int = 1000

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Drop them; returns whether there was one to drop."""
        dropped = 0
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.relu.default):
            (source,) = node.all_input_nodes
            taken = source.target in NOT_NEGATIVE and dropped < self.most
            context.note(self.name, node, f"ReLU of {source.target}", taken=taken)
            if taken:
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
                dropped += 1
        return dropped > 0
