"""promote: halves are computed in float32, rounded where the model can tell, and left alone where that differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from sepc.frontend.export import capture
from sepc.ir.printer import print_graph
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.promote import HALVES, Promote
from tests.helpers import Function

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
both_halves = pytest.mark.parametrize("half", HALVES, ids=str)


def promoted(model: nn.Module, *inputs: torch.Tensor) -> tuple[fx.GraphModule, list[str]]:
    """The graph after the pass and its notes; results are compared with eager, types and strides included."""
    module = capture(model.eval(), inputs).graph_module
    context = PassContext()
    PassManager([Promote(), Canonicalize()], verify_each=True).run(module, context)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*inputs))
        for actual, reference in zip(module(*inputs), expected, strict=True):
            assert (actual.dtype, actual.stride()) == (reference.dtype, reference.stride())
            torch.testing.assert_close(actual, reference, rtol=0.02, atol=0.02)
    return module, [note.message for note in context.notes if note.pass_name == "promote"]


def types(module: fx.GraphModule) -> dict[str, torch.dtype]:
    """The type of each operator's result, by its name without the overload."""
    return {
        str(node.target).split(".")[1]: node.meta["val"].dtype
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor)
    }


@both_halves
def test_layers_compute_in_float32_and_results_are_rounded(half: torch.dtype) -> None:
    layers = {"conv": nn.Conv2d(4, 8, 3), "norm": nn.BatchNorm2d(8), "linear": nn.Linear(8, 3)}

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.linear(functional.silu(self.norm(self.conv(x))).mean((2, 3)))

    module, notes = promoted(Function(forward, **layers).to(half), X.to(half))
    found = types(module)
    assert notes == []
    assert found.pop("_to_copy") == half  # The last one: the result.
    assert set(found.values()) == {torch.float32}
    assert {one.dtype for one in module.buffers()} == {torch.float32}


def test_a_model_without_halves_is_left_alone() -> None:
    module = capture(Function(lambda self, x: x.double() + x.sum()).eval(), (X,)).graph_module
    (record,) = PassManager([Promote()]).run(module, PassContext())
    assert not record.changed


@both_halves
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: (x.float() * 2, x.double() + 1, (x.float() + 1).to(x.dtype)), id="conversions"),
        pytest.param(lambda self, x: (x + x.float(), x * torch.ones(()), x @ x.mT), id="mixed operands"),
        pytest.param(lambda self, x: (x.sum(), x.float().sum(dtype=x.dtype)), id="types of sums"),
        pytest.param(lambda self, x: functional.softmax(x, 1, dtype=torch.float32), id="types as arguments"),
        pytest.param(lambda self, x: (x.max(1).values, x.split(2, 1), x.topk(2, 1).values), id="several results"),
        pytest.param(lambda self, x: (x.mT + 1, x[:, 1:].exp(), x.flatten(1), x.expand(3, 2, 4, 6, 6) * 2), id="views"),
        pytest.param(lambda self, x: ((x * 2)[:, 1:], (x + 1).split(3, 1), *(x * 3).mT.unbind(2)), id="its views"),
        pytest.param(lambda self, x: [y.exp() + y for y in (x * 2).split(2, 1)], id="computed of views"),
        pytest.param(lambda self, x: (torch.zeros_like(x) + x, torch.arange(3, dtype=x.dtype)), id="made of nothing"),
        pytest.param(lambda self, x: (x, x[:, 1:], x.clone()), id="inputs as results"),
        pytest.param(lambda self, x: torch.where(x > 0, x, -x.abs().sqrt()), id="masks"),
        pytest.param(lambda self, x: (x.half().bfloat16(), x.bfloat16().half() * 2), id="from half to half"),
    ],
)  # fmt: skip
def test_results_have_the_types_and_values_of_eager(function: Callable[..., Any], half: torch.dtype) -> None:
    _, notes = promoted(Function(function), X.to(half))
    assert notes == []


def test_inputs_and_their_views_are_returned_unconverted() -> None:
    module, _ = promoted(Function(lambda self, x: (x, x[:, 1:], x[:, 1:] * 2)), X.half())
    x = X.half()
    results = module(x)
    assert results[0] is x
    assert results[1].data_ptr() == x[:, 1:].data_ptr()


def test_values_are_rounded_before_they_are_compared_or_counted() -> None:
    def ties(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 0.0001  # Lost in halves near 1, not in float32.
        return y == x, y.argmax(), (y * 3).to(torch.int32), y > 1

    x = torch.tensor([1.0, 1.0, 2.0, 4.0]).half()
    module, _ = promoted(Function(ties), x)
    for actual, expected in zip(module(x), ties(None, x), strict=True):
        assert torch.equal(actual, expected)


def test_a_conversion_that_the_model_makes_rounds() -> None:
    module, _ = promoted(Function(lambda self, x: x.half().float()), X)
    assert torch.equal(module(X)[0], X.half().float())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: (x + 1).view(torch.int16), "aten.view.dtype stays as it is: its type in float32 is another"),
        (lambda self, x: torch.rand_like(x + 1) * 0, "aten.rand_like.default stays as it is: it is random"),
    ],
)  # fmt: skip
def test_an_operator_that_is_another_in_float32_stays(function: Callable[..., Any], reason: str) -> None:
    _, notes = promoted(Function(function), X.half())
    assert notes == [reason]


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU()).bfloat16().eval()
    module = capture(model, (X.bfloat16(),)).graph_module
    before = print_graph(module, sources=False)
    PassManager([Promote()]).run(module, PassContext())
    golden("passes/promote", f"# before\n{before}\n# after\n{print_graph(module, sources=False)}")
