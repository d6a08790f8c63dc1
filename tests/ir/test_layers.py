"""The accessors of convolutions and poolings: options per spatial dimension, whichever way they were given."""

from __future__ import annotations

import torch
from torch import fx

from sepc.ir.layers import Conv, GroupNorm, Pool, RMSNorm
from sepc.ir.ops import aten
from tests.helpers import call, typed


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


def test_normalisations_read_groups_and_epsilon() -> None:
    graph = fx.Graph()
    x = typed(graph, "x", 2, 6, 5, 5)
    group = GroupNorm.of(call(graph, aten.group_norm.default, x, 3, eps=0.5))
    assert (group.groups, group.eps, group.has_statistics) == (3, 0.5, False)
    instance = call(graph, aten.instance_norm.default, x, None, None, None, None, True, 0.1, 1e-3, False)
    assert (GroupNorm.of(instance).groups, GroupNorm.of(instance).eps) == (6, 1e-3)
    assert RMSNorm.of(call(graph, aten.rms_norm.default, x, [5])).eps == torch.finfo(torch.float32).eps
    assert RMSNorm.of(call(graph, aten.rms_norm.default, x, [5], None, 0.1)).eps == 0.1
