"""What the rest of the pipeline would make of convolutions in a row, as predicted time: by this, forms are weighed.

A graph of nothing but these convolutions, with an activation behind them, goes through all passes from `group` on, for
the machine and the threads at hand. So what is fused is counted as fused, and fast algorithms as what they are. Nothing
is generated, and weights do not matter; an answer takes some 50 ms, and is remembered.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sepc.cost_model.planner import AnyMachine, planner_of
from sepc.ir import region
from sepc.ir.element import FLOAT32, Element
from sepc.ir.layers import Conv
from sepc.ir.ops import aten
from sepc.ir.types import propagate_types
from sepc.passes.manager import PassContext, PassManager
from sepc.separable.geometry import Geometry


@lru_cache(maxsize=4096)
def sequence_us(
    layers: tuple[Geometry, ...], image: tuple[int, ...], machine: AnyMachine, threads: int, element: Element = FLOAT32
) -> float:
    """Predicted time of convolutions one after the other, on an image [N, I, pixels...] that lies channels-last.

    `element` is the type of all numbers.
    """
    graph_module = _graph_of(layers, image, getattr(torch, element.name))
    from sepc.passes.pipeline import PIPELINE  # Passes ask for predictions, too.

    first = next(index for index, one in enumerate(PIPELINE) if one.name == "group")
    PassManager(PIPELINE[first:]).run(graph_module, PassContext(machine=machine, threads=threads, element=element))
    return predicted_us(graph_module, machine, threads)


def predicted_us(graph_module: fx.GraphModule, machine: AnyMachine, threads: int) -> float:
    """Predicted time of the regions of a graph that has been through all passes, and of what lies between them.

    Regions without a prediction, those that TVM or PyTorch run, count as nothing.
    """
    choices = [node.meta.get("sepc_tiling") for node, _ in region.regions(graph_module)]
    times_us = [float(one.cost.time_us) for one in choices if one is not None]
    return sum(times_us) + planner_of(machine, threads).between_us * len(times_us)


def _graph_of(layers: tuple[Geometry, ...], image: tuple[int, ...], dtype: torch.dtype) -> fx.GraphModule:
    root, graph = torch.nn.Module(), fx.Graph()
    mode = FakeTensorMode()
    value = graph.placeholder("x")
    with mode:
        batch, channels, *pixels = image
        value.meta["val"] = torch.empty(batch, *pixels, channels, dtype=dtype).movedim(-1, 1)
    for index, layer in enumerate(layers):
        assert not isinstance(layer.padding, str), "graphs have numbers"
        root.register_buffer(f"weight_{index}", torch.zeros(layer.weight_shape, dtype=dtype))
        root.register_buffer(f"bias_{index}", torch.zeros(layer.out_channels, dtype=dtype))
        weight = graph.get_attr(f"weight_{index}")
        bias = graph.get_attr(f"bias_{index}") if index == len(layers) - 1 else None
        options = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        value = graph.call_function(Conv.targets[len(layer.kernel) - 1], (value, weight, bias, *options))
    graph.output((graph.call_function(aten.relu.default, (value,)),))
    graph_module = fx.GraphModule(root, graph)
    propagate_types(graph_module, mode)
    return graph_module
