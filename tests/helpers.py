"""What several tests use: a function as a module, the pipeline up to a pass, and nodes with types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sepc
from sepc.frontend.export import capture
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE
from sepc.target import Target

TOLERANCE = 1e-4
NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
COSTED = ("recompute", "fuse", "gather-means")
_MODE = FakeTensorMode()


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


def with_statistics(model: nn.Module) -> nn.Module:
    """`model` in eval mode, its batch normalisations with statistics of their own: new ones would do almost nothing."""
    for module in model.modules():
        if isinstance(module, NORMALIZATIONS):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def agrees_in_stages_of_ours(model: nn.Module, *inputs: torch.Tensor, foreign: tuple[str, ...] = ()) -> None:
    """Compile `model` and compare with eager; all regions are to be ours, but those of the operators `foreign`."""
    model = with_statistics(model)
    with torch.no_grad():
        expected = model(*inputs)
    compiled = sepc.compile(model, num_threads=2)
    result = compiled(*inputs)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= TOLERANCE * expected.abs().max()
    others = [(one.ops, one.reason) for one in compiled.regions if one.kernel != "sepc"]
    assert not [(ops, reason) for ops, reason in others if not all(op.split(".")[0] in foreign for op in ops)]


def typed(graph: fx.Graph, name: str, *sizes: int) -> fx.Node:
    """A placeholder of `graph`, a tensor of these sizes."""
    node = graph.placeholder(name)
    with _MODE:
        node.meta["val"] = torch.empty(sizes)
    return node


def call(graph: fx.Graph, target: Callable[..., object], *args: object, **kwargs: object) -> fx.Node:
    """A call of `target` in `graph`, with the type of its result."""
    node = graph.call_function(target, args, kwargs)
    with _MODE:
        values = fx.map_arg((args, kwargs), lambda value: value.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
    return node
