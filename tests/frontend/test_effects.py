"""What a call does to memory: found without running it, and compared with what was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from sepc.errors import ModelError
from sepc.frontend.effects import effects_of, expected_effects, misplaced, put_right

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
        assert not misplaced(expected, effects_of(graph(X), [X, *graph.parameters(), *graph.buffers()]))


def several(self: Any, x: torch.Tensor) -> Any:
    """Views of an input, of a weight, of a result and of what is no result, and what is none."""
    y, z = x + 1, x.exp()
    return x, x[:, 1:], self.table[1:, ::2], y, y.reshape(-1)[7:20], y.mT.contiguous(), z[:, :3], z[:, 3:], 3


def test_results_elsewhere_are_put_where_pytorch_has_them() -> None:
    graph = graph_of(several)
    inputs = [X, *graph.parameters()]
    expected = expected_effects(graph, [X])
    with torch.no_grad():
        reference = graph(X)
        copies = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in reference)
        places = misplaced(expected, effects_of(copies, inputs))
        assert places == [0, 1, 2, 3, 4, 6, 7]
        results = put_right(copies, places, expected, inputs)
    assert not misplaced(expected, effects_of(results, inputs))
    for mine, its in zip(results, reference, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)
    assert [results[place].data_ptr() for place in (0, 1, 2)] == [reference[place].data_ptr() for place in (0, 1, 2)]
    assert results[0] is X
    assert results[1] is not X
    assert results[4].data_ptr() == results[3].data_ptr() + 7 * 4
    assert results[7].data_ptr() == results[6].data_ptr() + 3 * 6 * 4  # parts of what is no result


def test_results_that_share_memory_where_pytorchs_do_not_are_copied() -> None:
    expected = expected_effects(graph_of(lambda self, x: (x.clone(), x.mT.clone())), [X])
    places = misplaced(expected, effects_of((X, X.mT.contiguous()), [X]))
    assert places == [0, 1]
    first, second = put_right((X, X.mT.contiguous()), places, expected, [X])
    assert first.data_ptr() != X.data_ptr()
    assert (torch.equal(first, X), torch.equal(second, X.mT)) == (True, True)
    assert second.stride() == X.mT.clone().stride()


@pytest.mark.parametrize(
    "other",
    [
        lambda self, x: (x, x[:, 1:].double()),
        lambda self, x: (x,),
        lambda self, x: (x, x[:, 2:]),
        lambda self, x: (x, 3),
    ],
)
def test_what_cannot_be_put_right_is_refused(other: Callable[..., Any]) -> None:
    expected = expected_effects(graph_of(lambda self, x: (x, x[:, 1:])), [X])
    with pytest.raises(ModelError, match="Compiled results"):
        misplaced(expected, effects_of(other(None, X), [X]))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x.exp()[:, :1].expand(2, 4, 6),  # elements in the same place
        lambda self, x: x.view(torch.int32),  # two types in one memory
    ],
)
def test_memory_that_cannot_be_had_is_refused(function: Callable[..., Any]) -> None:
    graph = graph_of(function)
    expected = expected_effects(graph, [X])
    with torch.no_grad():
        results = graph(X)
    copies = tuple(one.clone() for one in results) if isinstance(results, tuple) else results.clone()
    with pytest.raises(ModelError, match="do not lie in memory"):
        misplaced(expected, effects_of(copies, [X]))


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
