"""The accessors read arguments by name, whichever way they were given."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sepc.errors import VerificationError
from sepc.ir.layers import Linear
from sepc.ir.ops import (
    Accessor,
    Binary,
    Cat,
    Mean,
    Pad,
    Permute,
    Slice,
    arguments,
    aten,
    constant,
    is_op,
    per_dimension,
    tensor,
)
from tests.helpers import call, typed


def test_dimensions_are_counted_from_zero() -> None:
    graph = fx.Graph()
    x = typed(graph, "x", 2, 3, 4, 5)
    assert Mean.of(call(graph, aten.mean.dim, x, [-1, -2], True)).dims == (2, 3)
    assert Cat.of(call(graph, aten.cat.default, [x, x], -3)).dim == 1
    assert Permute.of(call(graph, aten.permute.default, x, [0, -1, 1, 2])).dims == (0, 3, 1, 2)
    part = Slice.of(call(graph, aten.slice.Tensor, x, -1, -3, 100))
    assert (part.dim, part.start, part.end, part.step) == (3, 2, 5, 1)


def test_pad_lists_amounts_per_dimension() -> None:
    graph = fx.Graph()
    pad = Pad.of(call(graph, aten.constant_pad_nd.default, typed(graph, "x", 2, 3, 4, 5), [1, 2, 3, 4], 0.5))
    assert (pad.before, pad.after, pad.value) == ((0, 0, 3, 1), (0, 0, 4, 2), 0.5)


def test_binary_reads_alpha_and_numbers() -> None:
    graph = fx.Graph()
    x = typed(graph, "x", 2)
    assert Binary.of(call(graph, aten.sub.Tensor, x, x, alpha=2)).alpha == 2
    assert Binary.of(call(graph, aten.mul.Tensor, x, 3.0)).other == 3.0


def test_an_accessor_refuses_another_operator_and_a_missing_argument() -> None:
    graph = fx.Graph()
    x = typed(graph, "x", 2)
    relu = call(graph, aten.relu.default, x)
    with pytest.raises(VerificationError, match="Not a Linear node"):
        Linear.of(relu)
    with pytest.raises(VerificationError, match="lacks an argument"):
        arguments(graph.call_function(aten.add.Tensor, (x,)))
    with pytest.raises(VerificationError, match="Only an ATen call"):
        arguments(x)
    assert not Accessor.__subclasses__()[0].matches(x)
    assert is_op(relu, aten.relu.default)


def test_types_and_constants_are_required() -> None:
    graph = fx.Graph()
    bare = graph.placeholder("bare")
    with pytest.raises(VerificationError, match="no tensor type"):
        tensor(bare)
    with pytest.raises(VerificationError, match="A constant is missing"):
        constant(torch.nn.Module(), graph.get_attr("weight"))
    assert per_dimension(3, 2) == (3, 3)
    assert per_dimension([3], 2) == (3, 3)
    assert per_dimension([1, 2], 2) == (1, 2)
