"""What a call does to memory: found without running it, and compared with what was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from sepc.errors import ModelError
from sepc.frontend.effects import effects_of, expected_effects, require_same

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


class OneInput(nn.Module):
    """A function of itself and one tensor: fx cannot trace `*args`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.table = function, nn.Parameter(torch.ones(4, 6))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def graph_of(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(OneInput(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: (x + 1, x, x[:, 1:], x.mT, 3, None),
        lambda self, x: (x.exp(), self.table, self.table[1:], x.reshape(-1)),
        lambda self, x: [x.exp()] * 2,
    ],
)
def test_expected_effects_are_those_of_pytorch(function: Callable[..., Any]) -> None:
    graph = graph_of(function)
    expected = expected_effects(graph, [X])
    with torch.no_grad():
        require_same(expected, effects_of(graph(X), [X, *graph.parameters(), *graph.buffers()]))


@pytest.mark.parametrize(
    "other",
    [
        lambda self, x: (x.clone(), x[:, 1:]),
        lambda self, x: (x, x[:, 1:].clone()),
        lambda self, x: (x, x[:, 1:].double()),
        lambda self, x: (x,),
        lambda self, x: (x, x[:, 2:]),
    ],
)
def test_a_difference_is_found(other: Callable[..., Any]) -> None:
    expected = expected_effects(graph_of(lambda self, x: (x, x[:, 1:])), [X])
    with pytest.raises(ModelError, match="Compiled results"):
        require_same(expected, effects_of(other(None, X), [X]))


@pytest.mark.parametrize("function", [lambda self, x: x.add_(1), lambda self, x: self.table.add_(1) + x])
def test_writes_are_refused_and_not_done(function: Callable[..., Any]) -> None:
    graph, before = graph_of(function), X.clone()
    with pytest.raises(ModelError, match="changes its inputs"):
        expected_effects(graph, [X])
    assert torch.equal(X, before)
    assert all(bool((one == 1).all()) for one in graph.parameters())


def test_writes_to_tensors_made_in_inference_mode_are_refused_too() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
    with pytest.raises(ModelError, match="changes its inputs"):
        expected_effects(fx.symbolic_trace(lambda x: x.add_(1)), (x,))


def test_what_cannot_run_without_memory_is_refused() -> None:
    with pytest.raises(ModelError, match="without memory"):
        expected_effects(graph_of(lambda self, x: x.flatten()[x.sum().to(torch.int64).item() :]), [X])
