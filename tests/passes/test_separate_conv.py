"""Convolutions that are products become the factors where that is predicted faster; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import sepc
from sepc.frontend.export import capture
from sepc.ir.layers import Conv
from sepc.ir.ops import shape
from sepc.ir.printer import print_graph
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.manager import Note, PassContext, PassManager
from sepc.passes.separate_conv import SeparateConv
from sepc.separable.fit import compose
from sepc.separable.forms import FORMS
from sepc.separable.geometry import Geometry, Layer
from sepc.target import Target
from tests.helpers import Function

MACHINE = Target.parse("x86-64-v3").machine
RANKS = {"bottleneck": 8, "depthwise-pointwise": 1, "pointwise-depthwise": 1, "spatial": 8, "channels": 8}
RANKS |= {"input-channels": 12, "output-channels": 8}


@pytest.fixture(autouse=True)
def _one_thread(_deterministic: None) -> None:
    torch.set_num_threads(1)  # What is decomposed here is small.


def planted(form: str, layer: Layer, rank: int) -> Layer:
    """`layer` with a weight that has this form."""
    whole = Geometry.of(layer)
    factors = [torch.randn(one.weight_shape, dtype=torch.float64) for one in FORMS[form].factors(whole, rank)]
    weight = compose(FORMS[form], whole, factors).float()
    with torch.no_grad():
        layer.weight.copy_(weight / weight.square().mean().sqrt() / weight[0].numel() ** 0.5)
    return layer


def run(
    model: nn.Module, x: torch.Tensor, one: SeparateConv | None = None, verify: bool = True
) -> tuple[fx.GraphModule, list[Note]]:
    """The graph after the pass, and its notes; verified against the graph before, and eager."""
    module = capture(model.eval(), (x,)).graph_module
    context = PassContext(machine=MACHINE, threads=1, example_inputs=(x,))
    PassManager([Canonicalize(), one or SeparateConv()], verify_each=verify).run(module, context)
    notes = [note for note in context.notes if note.pass_name == "separate-conv"]
    if verify:
        with torch.no_grad():
            expected, (actual,) = model(x), module(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not SeparateConv().run(module, context), "a second run changes nothing"
    return module, notes


def weights(module: fx.GraphModule) -> list[tuple[int, ...]]:
    return [shape(Conv.of(node).weight) for node in module.graph.nodes if Conv.matches(node)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(48, 64, 3, stride=2, padding=2, dilation=2, bias=False),
        nn.Conv2d(64, 128, 5, padding=2, groups=2),
    ],
    ids=["plain", "stride and dilation", "groups"],
)
def test_a_product_becomes_its_factors(form: str, layer: Layer) -> None:
    planted(form, layer, RANKS[form])
    module, notes = run(nn.Sequential(layer), torch.randn(1, layer.in_channels, 28, 28))
    assert weights(module) == [one.weight_shape for one in FORMS[form].factors(Geometry.of(layer), RANKS[form])]
    (note,) = notes
    assert note.taken
    assert note.message.startswith(f"{form} of rank {RANKS[form]}, ")
    assert note.after_us is not None
    assert note.before_us is not None
    assert note.after_us < note.before_us


@pytest.mark.parametrize(
    ("layer", "size"), [(nn.Conv1d(64, 64, 9), (1, 64, 400)), (nn.Conv3d(32, 32, 3), (1, 32, 10, 10, 10))]
)
def test_images_may_have_one_dimension_or_three(layer: Layer, size: tuple[int, ...]) -> None:
    module, notes = run(nn.Sequential(planted("bottleneck", layer, 8)), torch.randn(size))
    assert len(weights(module)) == 3
    assert notes[0].taken


def test_a_product_of_low_rank_becomes_two_of_one_tap() -> None:
    layer = planted("output-channels", nn.Conv2d(128, 96, 1, stride=2), 16)
    module, (note,) = run(nn.Sequential(layer), torch.randn(1, 128, 56, 56))
    assert weights(module) == [(16, 128, 1, 1), (96, 16, 1, 1)]
    assert note.taken


def test_dead_inputs_are_left_out() -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1)
    with torch.no_grad():
        layer.weight[:, 16:] = 0
    module, _ = run(nn.Sequential(layer), torch.randn(1, 64, 28, 28))
    assert weights(module)[0] == (16, 64, 1, 1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.Conv2d(32, 32, (1, 3), groups=32),
        nn.ConvTranspose2d(32, 32, 3),
    ],
    ids=["random", "pointwise", "depthwise", "depthwise row", "transposed"],
)
def test_what_is_no_product_is_left_without_a_word(layer: nn.Module) -> None:
    module, notes = run(nn.Sequential(layer), torch.randn(1, 32, 14, 14))
    assert len([node for node in module.graph.nodes if node.op == "call_function"]) == 1
    assert notes == []


def test_weights_computed_at_run_time_are_left() -> None:
    conv = planted("channels", nn.Conv2d(32, 32, 3), 2)
    model = Function(lambda self, x: nn.functional.conv2d(x, self.weight * x[:, :1, :1, :1].sum()), weight=conv.weight)
    _, notes = run(model, torch.randn(1, 32, 14, 14))
    assert notes == []


def test_what_is_not_predicted_faster_is_rejected_with_both_times() -> None:
    layer = planted("channels", nn.Conv2d(8, 8, 3, padding=1), 5)
    _, notes = run(nn.Sequential(layer), torch.randn(1, 8, 6, 6))
    (note,) = notes
    assert not note.taken
    assert "is predicted to take" in note.message
    assert note.before_us is not None


def test_a_fit_that_misses_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.passes.separate_conv.exact_forms", lambda whole, weight: iter([("spatial", 4)]))
    _, notes = run(nn.Sequential(nn.Conv2d(32, 32, 3)), torch.randn(1, 32, 14, 14))
    assert "spatial of rank 4 is" in notes[0].message
    assert not notes[0].taken


def test_an_error_may_be_allowed() -> None:
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 28, 28)
    planted("spatial", layer, 8)
    with torch.no_grad():
        layer.weight += 0.05 * layer.weight.square().mean().sqrt() * torch.randn(layer.weight.shape)
    assert len(weights(run(nn.Sequential(layer), x)[0])) == 1
    module, notes = run(nn.Sequential(layer), x, SeparateConv(max_error=0.06), verify=False)
    assert notes[0].taken
    assert len(weights(module)) > 1
    with torch.no_grad():
        assert float((module(x)[0] - layer(x)).norm() / layer(x).norm()) < 0.1


def test_compiled_models_profit() -> None:
    model = nn.Sequential(planted("bottleneck", nn.Conv2d(64, 64, 3, padding=1), 16), nn.ReLU()).eval()
    x = torch.randn(1, 64, 28, 28)
    compiled = sepc.compile(model, example_inputs=(x,))
    operators = [name for region in compiled.regions for name in region.ops if name.startswith("conv2d")]
    assert len(operators) == 3
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    layer = planted("bottleneck", nn.Conv2d(64, 64, 3, padding=1), 16)
    module = capture(nn.Sequential(layer).eval(), (torch.randn(1, 64, 28, 28),)).graph_module
    before = print_graph(module, sources=False)
    PassManager([SeparateConv()]).run(module, PassContext(machine=MACHINE))
    golden("passes/separate_conv", f"# before\n{before}\n# after\n{print_graph(module, sources=False)}")
