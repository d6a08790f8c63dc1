"""What GPU kernels load and store, counted in their code, is what the planner says: compulsory, halo and read again."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import fx, nn
from tvm.tirx.script.builder import ir as T

from sepc.backends.gpu.kernel import BlockFrame, block_function
from sepc.backends.gpu.lowering import lower_blocks
from sepc.backends.stages.kernel import Parameter, when
from sepc.cost_model.gpu_latency import GpuProblem
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_search import gpu_tilings
from sepc.cost_model.gpu_tiling import GpuTiling, is_depthwise, vector_groups
from sepc.cost_model.gpu_traffic import Links, global_elements, walk
from sepc.frontend.export import capture
from sepc.ir import region
from sepc.ir.convolution import Convolution
from sepc.ir.element import ELEMENTS, ElementName
from sepc.ir.problem import Problem
from sepc.passes import fuse
from sepc.passes.choose_tiling import chain_problems, region_problem
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE
from tests.backends.gpu.accesses import Accesses

T4 = GpuMachine.load("sm_75")
SIZE, CHANNELS, INNER, OUT = 13, 16, 48, 32


def expand() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, INNER, 1)


def depthwise(kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(INNER, INNER, kernel, stride, kernel // 2, groups=INNER)


def project() -> nn.Conv2d:
    return nn.Conv2d(INNER, OUT, 1)


MODELS: dict[str, tuple[nn.Module, ...]] = {
    "pw": (expand(),),
    "dw": (depthwise(),),
    "dw of stride 2": (depthwise(5, 2),),
    "dense": (nn.Conv2d(CHANNELS, OUT, 3, 2, 1),),
    "dw+pw": (depthwise(), nn.ReLU(), project()),
    "pw+dw": (expand(), nn.ReLU6(), depthwise(3, 2)),
    "pw+dw+pw": (expand(), nn.ReLU6(), depthwise(), nn.ReLU6(), project()),
    "pw+dw of stride 2+pw": (expand(), nn.ReLU6(), depthwise(5, 2), nn.ReLU6(), project()),
}


@cache
def lowered(name: str, dtype: ElementName = "float32") -> tuple[fx.GraphModule, tuple[Problem, ...]]:
    """The only region of a model of that type, as one kernel, and its links."""
    model = deepcopy(nn.Sequential(*MODELS[name])).eval().to(getattr(torch, dtype))
    first = next(one for one in model if isinstance(one, nn.Conv2d))
    x = torch.rand(2, first.in_channels, SIZE, SIZE).to(first.weight.dtype, memory_format=torch.channels_last)
    module = capture(model, (x,)).graph_module
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta["val"] = node.meta["val"].as_strided(x.shape, x.stride())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "piece_time_us", lambda links, *_: 1.0)
        PassManager(PIPELINE).run(module, PassContext(machine=T4, element=ELEMENTS[dtype]))
    ((node, graph),) = region.regions(module)
    is_chain = region.info(node).kind == "chain"
    return graph, chain_problems(node, graph) if is_chain else (region_problem(node, graph),)


def links_of(problems: tuple[Problem, ...]) -> Links:
    found = tuple(problem.stage for problem in problems if isinstance(problem.stage, Convolution))
    assert len(found) == len(problems)
    return found


def is_exact(links: Links, tiling: GpuTiling) -> bool:
    """Whether threads have no more channels than there are, as packed weights are padded for these."""
    widths = [tiling.chunk or tiling.channels] * (len(links) - 1) + [tiling.channels]
    whole = (
        link.out_channels % width == 0 and 4 * held.vectors * vector_groups(width, held) == width
        for link, width, held in zip(links, widths, tiling.links, strict=True)
    )
    return all(whole)


def some_tilings(links: Links, count: int) -> list[GpuTiling]:
    """A few of the tilings that the planner considers, the same ones each time."""
    none = (0,) * len(links)
    every = [one for one in gpu_tilings(GpuProblem(links, T4, none, none)) if is_exact(links, one)]
    return random.Random(0).sample(every, min(count, len(every)))


def counted(graph: fx.GraphModule, problems: tuple[Problem, ...], tiling: GpuTiling) -> dict[str, int]:
    """Elements of the input, of weights and biases, and of the result, that the blocks of the kernel touch."""
    kernel = lower_blocks(graph, problems, tiling)
    accesses = Accesses.of(kernel.function)
    names = [str(one.name) for one in kernel.function.params]
    is_constant = {name: isinstance(one, np.ndarray) for name, one in zip(names, kernel.arguments, strict=True)}
    loads: dict[str, int] = {"input": 0, "weights": 0}
    for name, count in accesses.loads.items():
        loads["weights" if is_constant[name] else "input"] += count
    (results,) = accesses.stores.values()
    return loads | {"results": results}


@pytest.mark.parametrize("dtype", get_args(ElementName))
@pytest.mark.parametrize("name", MODELS)
def test_blocks_touch_what_the_planner_says(name: str, dtype: ElementName) -> None:
    graph, problems = lowered(name, dtype)
    links = links_of(problems)
    assert {link.element.name for link in links} == {dtype}
    for tiling in some_tilings(links, 4):
        expected = global_elements(links, tiling)
        assert counted(graph, problems, tiling) == {
            "input": expected.compulsory + expected.halo + expected.reread,
            "weights": expected.weights + expected.weights_reread,
            "results": expected.results,
        }, tiling


def test_the_tilings_have_halos_and_read_again() -> None:
    """What is compared above is not only compulsory."""
    links = links_of(lowered("pw+dw+pw")[1])
    found = [walk(links, one.rows, one.columns, one.channels).elements for one in some_tilings(links, 6)]
    assert any(one.halo for one in found)
    assert any(one.reread for one in found)
    assert any(one.weights_reread for one in found)
    assert any(is_depthwise(link) for link in links)


def test_a_walk_counts_what_each_block_touches_once_and_refuses_what_is_outside() -> None:
    def function(elements: int) -> Any:
        def body(frame: BlockFrame) -> None:
            x, y = frame.buffers["x"], frame.buffers["y"]
            with when(frame.thread < 3), T.serial(2) as turn:
                value = T.Bind(x[frame.block * 2 + frame.thread + turn])
                T.buffer_store(y, value, [frame.block * 4 + frame.thread])

        parameters = [Parameter("x", elements), Parameter("y", 12)]
        return block_function(parameters, body, blocks=3, threads=4)

    assert Accesses.of(function(8)) == Accesses({"x": 3 * 4}, {"y": 3 * 3})
    with pytest.raises(AssertionError, match="x has 7 elements"):
        Accesses.of(function(7))
