"""demote: what stages of ours compute becomes float16, what others compute and the caller sees keeps its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from sepc.frontend.export import capture
from sepc.ir.element import FLOAT16
from sepc.ir.printer import print_graph
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.demote import Demote
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.promote import Promote
from tests.helpers import Function

SLICE = torch.ops.aten.slice.Tensor
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def demoted(model: nn.Module, *inputs: torch.Tensor) -> tuple[fx.GraphModule, list[str]]:
    """The graph after the pass and its notes; results are compared with eager, types and strides included."""
    module = capture(model.eval(), inputs).graph_module
    context = PassContext(element=FLOAT16, example_inputs=inputs)
    PassManager([Promote(), Canonicalize(), Demote()], verify_each=True).run(module, context)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*inputs))
        for actual, reference in zip(module(*inputs), expected, strict=True):
            assert (actual.dtype, actual.stride()) == (reference.dtype, reference.stride())
            torch.testing.assert_close(actual, reference, rtol=0.01, atol=0.01)
    return module, [note.message for note in context.notes if note.pass_name == "demote"]


def types(module: fx.GraphModule) -> dict[str, torch.dtype]:
    """The type of each operator's result, by its name without the overload."""
    return {
        str(node.target).split(".")[1]: node.meta["val"].dtype
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor)
    }


def conversions(module: fx.GraphModule) -> list[torch.dtype]:
    """What operands are converted to, in order."""
    copies = module.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    return [node.meta["val"].dtype for node in copies]


def test_stages_compute_in_float16_between_conversions(golden: Callable[[str, str], None]) -> None:
    layers = {"conv": nn.Conv2d(4, 8, 3), "linear": nn.Linear(8, 3)}

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = functional.pad(x, (1, 1, 1, 1))
        return self.linear(functional.silu(self.conv(y)).mean((2, 3)))

    module, notes = demoted(Function(forward, **layers), X)
    assert {one.dtype for one in module.buffers()} == {torch.float16}
    assert conversions(module) == [torch.float16, torch.float32]
    assert len(notes) == 1
    assert notes[0].endswith("operators compute in float16")
    golden("passes/demote", print_graph(module))


def test_without_being_asked_for_it_does_nothing() -> None:
    module = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),)).graph_module
    (record,) = PassManager([Demote()]).run(module, PassContext())
    assert not record.changed


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_of_a_model_in_float16_vanish(half: torch.dtype) -> None:
    module, _ = demoted(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()).to(half), X.to(half))
    assert set(types(module)) == ({"conv2d", "relu"} if half == torch.float16 else {"conv2d", "relu", "_to_copy"})


def test_what_has_no_stage_stays_float32_and_views_follow_what_they_view() -> None:
    layers = {"first": nn.Conv2d(4, 6, 1), "last": nn.Conv2d(6, 4, 1)}

    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.first(x)
        wide = functional.interpolate(y, scale_factor=2.0, mode="bilinear")
        return self.last(wide[:, :, 1:]), y[:, 1:].relu(), x[:, 1:], x.argmax(1), wide.sum(1)

    module, _ = demoted(Function(forward, **layers), X)
    assert types(module)["upsample_bilinear2d"] == torch.float32
    slices = [node.meta["val"].dtype for node in module.graph.find_nodes(op="call_function", target=SLICE)]
    assert sorted(slices, key=str) == [torch.float16, torch.float32, torch.float32]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: functional.softmax(self.linear(x), -1, dtype=torch.float32), id="types named"),
        pytest.param(lambda self, x: torch.split(self.linear(x), 1, -1), id="several results"),
        pytest.param(lambda self, x: (self.linear(x) > 0, self.linear(x).double()), id="other types"),
        pytest.param(lambda self, x: (self.linear(x).half(), self.linear(x).half().float() + 1), id="rounded"),
        pytest.param(lambda self, x: (x, x.clone(), self.linear.weight), id="inputs and constants"),
    ],
)
def test_results_keep_their_types(function: Callable[..., Any]) -> None:
    demoted(Function(function, linear=nn.Linear(6, 3)), X)


@pytest.mark.parametrize("scale", [1e6, 1e-7])
def test_constants_out_of_range_keep_their_layer_in_float32(scale: float) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    nn.init.normal_(model[1].weight, std=scale)
    nn.init.zeros_(model[1].bias)
    module = capture(model, (X,)).graph_module
    context = PassContext(element=FLOAT16)
    PassManager([Canonicalize(), Demote()]).run(module, context)
    first, second = module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert (first.meta["val"].dtype, second.meta["val"].dtype) == (torch.float16, torch.float32)
    (reason,) = (note.message for note in context.notes if not note.taken)
    assert "out of float16's range" in reason
