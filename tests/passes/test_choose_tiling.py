"""choose-tiling: every region of ours gets a tiling; one that is no loop nest goes to PyTorch, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sepc
from sepc.cost_model.search import Choice
from sepc.cost_model.tiling import DenseTiling, LaneTiling, ProductTiling, RowTiling
from sepc.errors import VerificationError
from sepc.frontend.export import capture
from sepc.ir import region
from sepc.passes.choose_tiling import ChooseTiling, choice, region_problem
from sepc.passes.manager import PassContext
from tests.helpers import Function, passes_until

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def test_every_region_of_ours_is_annotated_by_its_stage() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.AvgPool2d(2), nn.Flatten(2), nn.LayerNorm(1), nn.GELU()
    )
    module, _ = passes_until("choose-tiling", model, X)
    tilings = {region.info(node).kind: type(choice(node).tiling) for node, _ in region.regions(module)}
    assert tilings == {"convolution": LaneTiling, "pooling": LaneTiling, "normalization": RowTiling}
    first, graph = next(one for one in region.regions(module) if region.info(one[0]).kind == "convolution")
    assert isinstance(choice(first), Choice)
    assert isinstance(choice(first).tiling, DenseTiling)
    assert choice(first).cost.flops == region_problem(first, graph).stage.flops


def test_a_region_run_by_pytorch_has_no_tiling() -> None:
    module, _ = passes_until("choose-tiling", Function(lambda self, x: x.log_softmax(1)), X)
    ((node, _),) = region.regions(module)
    with pytest.raises(VerificationError, match="no tiling"):
        choice(node)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda self, x: self.linear(x.view(2, 4, 3, 2, 6).permute(1, 3, 2, 0, 4)), id="linear"),
        pytest.param(lambda self, x: x.view(2, 4, 3, 2, 6).permute(0, 2, 1, 4, 3) @ x[:, None, :, :2], id="product"),
    ],
)
def test_a_region_that_is_no_loop_nest_is_handed_to_pytorch_with_the_reason(function: Callable[..., Any]) -> None:
    model = Function(function, linear=nn.Linear(6, 5)).eval()
    module, context = passes_until("choose-tiling", model, X)
    info = next(region.info(node) for node, _ in region.regions(module) if region.info(node).kind != "copy")
    assert info.kernel == "torch"
    assert "advance differently" in info.reason
    assert info.reason in [note.message for note in context.notes]
    torch.testing.assert_close(sepc.compile(model)(X), model(X).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "size", "algorithms"),
    [
        (nn.Conv2d(384, 512, 1), 14, {"Strassen's algorithm"}),
        (nn.Conv2d(64, 64, 3, padding=1), 28, {"Winograd's algorithm"}),
        (nn.Conv2d(16, 16, 3, padding=1, groups=16), 28, set()),
    ],
    ids=["pointwise", "3x3", "depthwise"],
)
def test_fast_algorithms_are_noted_with_the_time_of_the_plain_form(
    model: nn.Conv2d, size: int, algorithms: set[str]
) -> None:
    module, context = passes_until("choose-tiling", model, torch.randn(1, model.in_channels, size, size))
    node = next(node for node, _ in region.regions(module) if region.info(node).kind == "convolution")
    notes = [note for note in context.notes if note.pass_name == "choose-tiling"]
    assert {name for name in algorithms for note in notes if name in note.message} == algorithms
    assert len(notes) == len(algorithms)
    for note in notes:
        assert note.nodes == (node.name,)
        assert note.taken == isinstance(choice(node).tiling, ProductTiling) == note.message.startswith("by ")
        assert choice(node).cost.time_us == (note.after_us if note.taken else note.before_us)
        assert note.gain_us is not None
        assert note.gain_us > 0 or not note.taken


def test_the_pass_needs_a_machine() -> None:
    with pytest.raises(VerificationError, match="needs a machine"):
        ChooseTiling().run(capture(nn.ReLU(), (X,)).graph_module, PassContext())
