"""The pipeline with the planner of a GPU: what is fused there, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from torch import fx, nn

from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_tiling import GpuTiling, is_dense
from sepc.cost_model.tiling import ChainTiling, ProductTiling
from sepc.frontend.export import capture
from sepc.ir import region
from sepc.passes.choose_tiling import chain_problems, choice
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE

A100, T4 = GpuMachine.load("sm_80"), GpuMachine.load("sm_75")


def planned(model: nn.Module, *inputs: torch.Tensor, machine: GpuMachine = A100) -> tuple[fx.GraphModule, PassContext]:
    """The graph of `model` after all passes."""
    module = capture(model.eval(), inputs).graph_module
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = node.meta["val"].as_strided(value.shape, value.stride())
    context = PassContext(machine=machine, threads=1)
    PassManager(PIPELINE).run(module, context)
    return module, context


def separable(inputs: int, inner: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """An inverted residual without its addition."""
    return nn.Sequential(
        nn.Conv2d(inputs, inner, 1),
        nn.ReLU6(),
        nn.Conv2d(inner, inner, 3, stride, 1, groups=inner),
        nn.ReLU6(),
        nn.Conv2d(inner, outputs, 1),
    )


def image(channels: int, size: int) -> torch.Tensor:
    return torch.rand(1, channels, size, size).to(memory_format=torch.channels_last)


@cache
def mobilenet() -> fx.GraphModule:
    torch.manual_seed(0)
    return planned(timm.create_model("mobilenetv2_100"), image(3, 224))[0]


def test_the_plan_of_a_mobilenet(golden: Callable[[str, str], None]) -> None:
    lines = []
    for node, graph in region.regions(mobilenet()):
        inner = [str(one.target).split(".")[1] for one in region.computations(graph)]
        lines.append(f"{node.name}: {', '.join(inner)}\n    {choice(node)}\n")
    golden("passes/gpu_mobilenetv2_sm_80", "".join(lines))


def test_every_tiling_of_a_mobilenet_is_a_gpus_and_fits_it() -> None:
    chains = 0
    for node, graph in region.regions(mobilenet()):
        tiling = choice(node).tiling
        assert not isinstance(tiling, ProductTiling | ChainTiling)
        if not isinstance(tiling, GpuTiling):
            assert region.info(node).kind == "pooling"
            continue
        assert A100.resident_blocks(tiling.threads, tiling.registers, tiling.shared_bytes) > 0
        if region.info(node).kind == "chain":
            chains += 1
            assert len(tiling.links) == len(chain_problems(node, graph))
    assert chains > 10


def test_a_whole_inverted_residual_becomes_one_kernel_where_that_is_quicker() -> None:
    module, context = planned(separable(16, 96, 24, stride=2), image(16, 112), machine=T4)
    ((node, graph),) = region.regions(module)
    links = chain_problems(node, graph)
    assert [is_dense(problem.stage) for problem in links] == [True, False, True]
    (note,) = [note for note in context.notes if note.pass_name == "fuse" and note.taken]
    assert note.before_us is not None
    assert note.after_us is not None
    assert choice(node).cost.time_us == pytest.approx(note.after_us)
    assert note.after_us < note.before_us


def test_layers_stay_apart_where_one_kernel_would_take_longer() -> None:
    module, context = planned(separable(160, 960, 160), image(160, 7))
    assert len(list(region.regions(module))) > 1
    (whole,) = [note for note in context.notes if note.pass_name == "fuse" and len(note.nodes) == 3]
    assert not whole.taken
    assert whole.before_us is not None
    assert whole.after_us is not None
    assert whole.after_us > whole.before_us


def test_what_has_no_kernel_as_a_whole_is_no_candidate() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.MaxPool2d(2), nn.Conv2d(16, 32, 1))
    module, context = planned(model, image(16, 56))
    assert len(list(region.regions(module))) == 3
    assert not [note for note in context.notes if note.pass_name == "fuse"]


def test_means_are_not_gathered_and_algorithms_not_offered() -> None:
    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(64, 64, 3, 1, 1, groups=64)
            self.squeeze, self.dense = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.depthwise(x)
            return self.dense(y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid())

    module, context = planned(Excited(), image(64, 56))
    assert all(note.message.startswith("means") for note in context.notes if note.pass_name == "gather-means")
    assert not [note for note in context.notes if "algorithm" in note.message]
    assert all(region.info(node).kernel == "sepc" for node, _ in region.regions(module))


def test_the_objective_memory_plans_for_a_gpu_too() -> None:
    from sepc.passes.pipeline import pipeline

    module = capture(separable(16, 96, 24).eval(), (image(16, 56),)).graph_module
    PassManager(pipeline("memory")).run(module, PassContext(machine=A100, threads=4))
    assert all(isinstance(choice(node).tiling, GpuTiling) for node, _ in region.regions(module))
