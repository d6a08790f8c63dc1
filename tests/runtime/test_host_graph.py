"""Regions that PyTorch runs, as data."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from sepc.errors import ArtifactError
from sepc.runtime.host_graph import HostGraph, HostOp, function_of, name_of
from sepc.runtime.records import Value

aten = torch.ops.aten


def test_a_graph_computes_what_its_operators_say() -> None:
    # (x @ c).topk(2) → (values + 1, indices)
    weight = torch.randn(3, 4)
    ops = (
        HostOp(aten.mm.default, (Value(0), Value(1))),
        HostOp(aten.topk.default, (Value(2), 2), {"dim": -1}),
        HostOp(operator.getitem, (Value(3), 0)),
        HostOp(operator.getitem, (Value(3), 1)),
        HostOp(aten.add.Tensor, (Value(4), 1)),
    )
    graph = HostGraph(1, (weight,), ops, (Value(6), Value(5)))
    x = torch.randn(2, 3)
    expected = (x @ weight).topk(2)
    for _ in range(2):  # what the first run has let go of is there again
        values, indices = graph(x)
        assert torch.equal(values, expected.values + 1)
        assert torch.equal(indices, expected.indices)


def test_a_value_lives_until_its_last_reader_and_a_result_beyond() -> None:
    ops = (HostOp(aten.relu.default, (Value(0),)), HostOp(aten.cat.default, ([Value(0), Value(1)],)))
    assert HostGraph(1, (), ops, Value(2))._dead_after == [[], [0, 1]]
    assert HostGraph(1, (), ops, (Value(1), Value(2)))._dead_after == [[], [0]]


@pytest.mark.parametrize(
    ("args", "result"), [((Value(1),), Value(1)), ((Value(-1),), Value(1)), (([Value(7)],), Value(1)), ((), Value(2))]
)
def test_a_value_that_is_not_there_yet_is_refused(args: Any, result: Any) -> None:
    with pytest.raises(ValueError, match="value that there is not"):
        HostGraph(1, (), (HostOp(aten.relu.default, args),), result).require_earlier_values()


@pytest.mark.parametrize("function", [aten.topk.default, aten.add.Tensor, operator.getitem])
def test_an_operator_is_found_again_by_its_name(function: Any) -> None:
    assert function_of(name_of(function)) is function


@pytest.mark.parametrize("function", [operator.add, torch.relu, torch.ops.prims.sin.default, print])
def test_only_operators_of_aten_have_a_name(function: Any) -> None:
    with pytest.raises(ArtifactError, match="cannot be saved"):
        name_of(function)


@pytest.mark.parametrize(
    "name",
    ["", "aten", "aten.topk", "aten.topk.nonsense", "aten.nonsense.default", "prims.sin.default", "os.system.default",
     "aten.topk.default.redispatch", "aten.__class__.mro", "torchvision.nms", "builtins.eval.default"],
)  # fmt: skip
def test_a_file_can_name_nothing_else(name: str) -> None:
    with pytest.raises(ArtifactError, match="no operator"):
        function_of(name)
