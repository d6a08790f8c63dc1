"""A printed graph is a program that builds the graph again: nodes, names, regions, types and results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import fx, nn

from sepc.errors import InputError
from sepc.frontend.export import capture
from sepc.ir import region
from sepc.ir.rebuild import build, stand_in
from sepc.ir.script import script
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.observers import Observer
from sepc.passes.pipeline import PIPELINE
from sepc.target import Target
from tests.helpers import Function, passes_until, with_statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from sepc.passes.manager import Pass

ROOT = Path(__file__).parents[2]
IMAGE = torch.randn(2, 8, 12, 10)


def squeeze_excite() -> nn.Module:
    """Regions of several kinds, one with two results, batch normalisations to fold, and a bare list of weights."""
    layers = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.SiLU())
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Sigmoid())

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.layers(x))
        return x + self.project(y * self.gate(y))

    whole = Function(forward, layers=layers, depthwise=depthwise, gate=gate, project=nn.Conv2d(16, 8, 1))
    return with_statistics(whole)


def odd(self: nn.Module, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What printers trip over: no tensor among the arguments, types, infinities, several results, lists of nodes."""
    first, second = (x + torch.arange(10)).clamp(max=float("inf")).split(4, 1)
    chosen = self.table[index].to(torch.float64).masked_fill(index[..., None] > 0, float("nan"))
    return torch.cat([second, first], 1).movedim(1, -1), chosen, torch.full((2,), -float("inf")), first


def run(text: str, path: Path = Path("graph.py")) -> dict[str, object]:
    """The variables of a program."""
    variables: dict[str, object] = {"__name__": "graph", "__file__": str(path)}
    exec(compile(text, str(path), "exec"), variables)
    return variables


def tensors_in(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """What stands in the graph and its regions, by name."""
    own = {node.target: getattr(module, node.target) for node in module.graph.find_nodes(op="get_attr")}
    for node, inner in region.regions(module):
        own |= {f"{node.target}.{name}": value for name, value in tensors_in(inner).items()}
    return own


def agree(original: fx.GraphModule, rebuilt: fx.GraphModule) -> None:
    """Nodes, in order, with their names, arguments and types; placeholders come first in what is rebuilt."""
    for one, other in zip(
        *(sorted(module.graph.nodes, key=first_inputs) for module in (original, rebuilt)), strict=True
    ):
        assert (one.op, one.name, str(one.target)) == (other.op, other.name, str(other.target))
        assert str((one.args, one.kwargs)) == str((other.args, other.kwargs))
        assert str(one.meta.get("val")) == str(other.meta.get("val"))
        if one.op == "call_module":
            agree(original.get_submodule(one.target), rebuilt.get_submodule(one.target))


def first_inputs(node: fx.Node) -> bool:
    return node.op != "placeholder"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[fx.GraphModule], Path]:
    """Writes a program, with its constants beside it."""

    def write(module: fx.GraphModule) -> Path:
        constants = list(tensors_in(module).values())
        for number, value in enumerate(constants):
            torch.save(value, tmp_path / f"{number}.pt")
        numbers = {id(value): number for number, value in enumerate(constants)}
        path = tmp_path / "graph.py"
        path.write_text(script(module, "After a pass", lambda value: f'torch.load(here / "{numbers[id(value)]}.pt")'))
        return path

    return write


def test_what_is_printed_after_any_pass_builds_the_same_graph(written: Callable[[fx.GraphModule], Path]) -> None:
    seen: list[str] = []

    class Rebuild(Observer):
        def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
            path = written(graph_module)
            rebuilt = run(path.read_text(), path)["graph_module"]
            assert isinstance(rebuilt, fx.GraphModule)
            agree(graph_module, rebuilt)
            assert torch.equal(rebuilt(IMAGE)[0], graph_module(IMAGE)[0])
            seen.extend([one.name] if changed else [])

    module = capture(squeeze_excite(), (IMAGE,)).graph_module
    context = PassContext(machine=Target.parse("x86-64-v3").machine, threads=2)
    PassManager(PIPELINE, observers=[Rebuild()]).run(module, context)
    assert {"canonicalize", "fold-batch-norm", "group", "gather-means", "plan-layout"} <= {*seen}


def test_a_graph_is_built_again_whatever_its_operators_take(written: Callable[[fx.GraphModule], Path]) -> None:
    inputs = torch.randn(1, 6, 4, 10).contiguous(memory_format=torch.channels_last), torch.tensor([[0, 1], [2, 0]])
    module = capture(Function(odd, table=torch.randn(3, 5)).eval(), inputs).graph_module
    path = written(module)
    rebuilt = run(path.read_text(), path)["graph_module"]
    assert isinstance(rebuilt, fx.GraphModule)
    agree(module, rebuilt)
    torch.testing.assert_close(rebuilt(*inputs), module(*inputs), rtol=0, atol=0, equal_nan=True)


def test_without_its_constants_a_program_has_random_ones_of_their_types_and_says_so() -> None:
    module, _ = passes_until("fold-batch-norm", squeeze_excite(), IMAGE)
    text = script(module, "After fold-batch-norm")
    variables = run(text)
    assert "constants = {  # random, as numbers are not printed" in text
    rebuilt, (given,) = variables["graph_module"], variables["inputs"]
    assert isinstance(rebuilt, fx.GraphModule)
    agree(module, rebuilt)
    assert given.shape == IMAGE.shape
    assert rebuilt(given)[0].isfinite().all()
    for name, value in tensors_in(module).items():
        setattr(module, name, stand_in(str(value.dtype).removeprefix("torch."), value.shape))
    assert torch.equal(module(given)[0], rebuilt(given)[0])


def test_a_program_runs_by_itself(written: Callable[[fx.GraphModule], Path]) -> None:
    module, _ = passes_until("group", squeeze_excite(), IMAGE)
    command = [sys.executable, str(written(module))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.startswith("(tensor([[[[")


def test_operators_of_other_packages_are_there() -> None:
    torchvision = pytest.importorskip("torchvision")
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    model = Function(lambda _, features, boxes: torchvision.ops.roi_align(features, [boxes], 2))
    text = script(capture(model.eval(), (torch.randn(1, 2, 4, 4), boxes)).graph_module, "Input")
    assert "import torchvision  # for its operators" in text
    rebuilt = run(text)["graph_module"]
    assert isinstance(rebuilt, fx.GraphModule)
    assert any("roi_align" in str(node.target) for node in rebuilt.graph.nodes)


def test_inputs_that_do_not_fit_are_told() -> None:
    with pytest.raises(InputError, match=r"There are 2 inputs\.\n  Where: <lambda>\n  Why: it takes x"):
        build(lambda self, x: (x,), (IMAGE, IMAGE), {})


def test_stand_ins_have_type_and_strides_and_are_the_same_each_time() -> None:
    made = stand_in("float16", [2, 3, 4], strides=[12, 1, 3])
    assert (made.dtype, made.shape, made.stride()) == (torch.float16, (2, 3, 4), (12, 1, 3))
    assert torch.equal(made, stand_in("float16", [2, 3, 4], strides=[12, 1, 3]))
    assert made.min() > 0
    assert made.sum(1).max() <= 1
    assert stand_in("int64", [3]).tolist() == [0, 0, 0]
    assert stand_in("float32", []).dim() == 0
