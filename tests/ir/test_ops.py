"""The accessors read arguments by name, whichever way they were given."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sepc.errors import VerificationError
from sepc.ir.ops import (
    Accessor,
    Binary,
    Cat,
    Conv,
    Linear,
    Mean,
    Pad,
    Permute,
    Pool,
    Slice,
    arguments,
    aten,
    constant,
    is_op,
    per_dimension,
    tensor,
)

MODE = FakeTensorMode()


def typed(graph: fx.Graph, name: str, *sizes: int) -> fx.Node:
    node = graph.placeholder(name)
    with MODE:
        node.meta["val"] = torch.empty(sizes)
    return node


def call(graph: fx.Graph, target: object, *args: object, **kwargs: object) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    with MODE:
        values = fx.map_arg((args, kwargs), lambda value: value.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
    return node


def test_conv_reads_positional_keyword_and_default_arguments_alike() -> None:
    graph = fx.Graph()
    x, weight, bias = typed(graph, "x", 1, 8, 9, 9), typed(graph, "w", 6, 4, 3, 3), typed(graph, "b", 6)
    positional = Conv.of(call(graph, aten.conv2d.default, x, weight, bias, [2, 1], [1, 0], [1, 1], 2))
    keyword = Conv.of(
        call(graph, aten.conv2d.default, x, weight=weight, bias=bias, stride=[2, 1], padding=[1, 0], groups=2)
    )
    assert positional == keyword
    assert (keyword.stride, keyword.padding, keyword.dilation, keyword.groups) == ((2, 1), (1, 0), (1, 1), 2)
    assert (keyword.kernel, keyword.in_channels, keyword.out_channels) == ((3, 3), 8, 6)
    assert not keyword.is_depthwise
    assert not keyword.is_pointwise


def test_conv1d_and_conv3d_have_one_and_three_spatial_options() -> None:
    graph = fx.Graph()
    one = call(
        graph, aten.conv1d.default, typed(graph, "x", 1, 2, 9), typed(graph, "w", 2, 1, 3), None, [2], [1], [1], 2
    )
    three = call(graph, aten.conv3d.default, typed(graph, "y", 1, 2, 4, 4, 4), typed(graph, "v", 2, 2, 1, 1, 1))
    assert Conv.of(one).stride == (2,)
    assert Conv.of(one).is_depthwise
    assert Conv.of(three).padding == (0, 0, 0)
    assert Conv.of(three).is_pointwise


def test_pool_fills_in_the_stride_and_tells_kinds_apart() -> None:
    graph = fx.Graph()
    x = typed(graph, "x", 1, 2, 8, 8)
    largest = Pool.of(call(graph, aten.max_pool2d.default, x, [2, 2]))
    average = Pool.of(call(graph, aten.avg_pool2d.default, x, [3, 3], [2, 2], [1, 1], True, False))
    adaptive = Pool.of(call(graph, aten.adaptive_avg_pool2d.default, x, [2, 4]))
    line = Pool.of(call(graph, aten.max_pool1d.default, typed(graph, "y", 1, 2, 8), 2))
    assert (largest.kind, largest.stride, largest.dilation) == ("max", (2, 2), (1, 1))
    assert (average.kind, average.ceil_mode, average.count_include_pad) == ("avg", True, False)
    assert (adaptive.kind, adaptive.output_size, adaptive.kernel) == ("adaptive_avg", (2, 4), ())
    assert (line.kind, line.kernel, line.stride) == ("max", (2,), (2,))


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
