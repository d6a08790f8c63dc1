"""What several tests use: a function as a module, and the pipeline up to a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from sepc.frontend.export import capture
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE
from sepc.target import Target

COSTED = ("recompute", "fuse", "gather-means")


class Function(nn.Module):
    """A function of itself, for its layers, and of the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, nn.Parameter(layer) if isinstance(layer, torch.Tensor) else layer)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def passes_until(last: str, model: nn.Module, *inputs: torch.Tensor) -> tuple[fx.GraphModule, PassContext]:
    """The graph of `model` after pass `last`, for two threads of an AVX2 machine; verified after every pass.

    Without `COSTED` passes, unless one is the last: what they do depends on figures of the cost model, and most
    tests are about single regions.
    """
    module = capture(model.eval(), inputs).graph_module
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = node.meta["val"].as_strided(value.shape, value.stride())
    names = [one.name for one in PIPELINE]
    passes = [one for one in PIPELINE[: names.index(last) + 1] if one.name == last or one.name not in COSTED]
    context = PassContext(machine=Target.parse("x86-64-v3").machine, threads=2, example_inputs=inputs)
    PassManager(passes, verify_each=True).run(module, context)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*inputs))
        for actual, reference in zip(module(*inputs), expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)
    return module, context
