"""gather-means: which regions gather the means of their rows, which do not and why, and that the results are right."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import fx, nn

import sepc
from sepc.cost_model.machine import Machine
from sepc.errors import VerificationError
from sepc.frontend.export import capture
from sepc.ir import region
from sepc.ir.printer import print_graph
from sepc.passes import fuse, gather_means
from sepc.passes.gather_means import GatherMeans
from sepc.passes.manager import PassContext, PassManager
from sepc.target import Target
from tests.helpers import Function, passes_until

X = torch.randn(2, 8, 12, 10, generator=torch.Generator().manual_seed(0))
Layers = Callable[[Function, torch.Tensor], Any]


def layers() -> dict[str, nn.Module]:
    return {
        "depth": nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        "strided": nn.Conv2d(8, 8, 5, 2, groups=8),
        "dense": nn.Conv2d(8, 20, 3, 1, 1),
        "excite": nn.Conv2d(8, 8, 1),
        "project": nn.Conv2d(8, 12, 1),
    }


def squeeze_and_excite(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.depth(x).relu()
    factor = self.excite(y.mean((2, 3), keepdim=True)).sigmoid()
    result: torch.Tensor = self.project(y * factor)
    return result


def odd_columns(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.strided(x)[:, :, :3]
    y = self.depth(y)
    return y * y.mean((2, 3), keepdim=True)


def gathered(function: Layers, x: torch.Tensor = X) -> tuple[fx.GraphModule, PassContext]:
    """The graph after gather-means, verified against the one before."""
    module, context = passes_until("group", Function(function, **layers()), x)
    PassManager([GatherMeans()], verify_each=True).run(module, context)
    return module, context


def with_means(module: fx.GraphModule) -> int:
    """Regions that return the means of their rows."""
    return sum(region.row_means(graph) is not None for _, graph in region.regions(module))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering always gains."""
    monkeypatch.setattr(gather_means, "_times_us", lambda problems, pools, context: (2.0, 1.0))


@pytest.mark.usefixtures("always")
def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    before, _ = passes_until("group", Function(squeeze_and_excite, **layers()), X)
    after, _ = gathered(squeeze_and_excite)
    texts = [print_graph(module, sources=False) for module in (before, after)]
    golden("passes/gather_means", "# before\n{}\n# after\n{}".format(*texts))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("function", [squeeze_and_excite, odd_columns])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chained", [False, True])
def test_compiled_models_are_right(
    function: Layers, threads: int, chained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    price = 1.0 if chained else 10.0
    monkeypatch.setattr(fuse, "piece_time_us", lambda links, *_: price if len(links) > 1 else 1.0)
    model = Function(function, **layers()).eval()
    compiled = sepc.compile(model, num_threads=threads, example_inputs=(X,))
    assert with_means(compiled.graph_module) == 1
    with torch.no_grad():
        # Twice, as what the first call leaves in the arena must not be added to.
        for x in (X, 3 - X):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def nobody_else(self: Function, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.depth(x).mean((2, 3), keepdim=True)
    return result


def concatenated(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.depth(x)
    return torch.cat([y * 2, y, y.mean((2, 3), keepdim=True).expand_as(y)], 1)


def dense_rows(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.dense(x)
    return y * y.mean((2, 3), keepdim=True)


def one_row(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.depth(x[:, :, :1])
    return y * y.mean((2, 3), keepdim=True)


def elementwise(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = x.relu()
    return y * y.mean((2, 3), keepdim=True)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (nobody_else, "nobody else reads the value"),
        (concatenated, "it is concatenated"),
        (dense_rows, "its rows may be split between tasks"),
        (one_row, "it is no image with rows"),
        (elementwise, "no stage of ours computes it row by row"),
    ],
)
def test_what_is_not_gathered_is_noted_with_the_reason(function: Layers, reason: str) -> None:
    module, context = gathered(function)
    assert with_means(module) == 0
    assert [note.message for note in context.notes if note.pass_name == "gather-means"] == [
        f"means of its rows not gathered: {reason}"
    ]


@pytest.mark.parametrize(("width", "expected"), [(1, 0), (112, 1)])
def test_the_cost_model_decides(width: int, expected: int) -> None:
    """Means of rows of one column are no fewer than the values."""
    module, context = gathered(squeeze_and_excite, torch.randn(1, 8, 112, width))
    assert with_means(module) == expected
    (note,) = (note for note in context.notes if note.pass_name == "gather-means")
    assert note.gain_us is not None
    assert (note.taken, note.gain_us > 0, "no gain" in note.message) == (bool(expected), bool(expected), not expected)
    assert len(note.nodes) == 2


def test_the_pass_needs_a_machine() -> None:
    with pytest.raises(VerificationError, match="needs a machine"):
        GatherMeans().run(capture(nn.ReLU(), (X,)).graph_module, PassContext())


def test_a_region_with_means_keeps_its_inputs_until_both_results_are_written() -> None:
    """Storages of the results do not overlap those of the inputs, though they are taken apart after the region."""
    from sepc.passes.pipeline import PIPELINE

    module = capture(Function(squeeze_and_excite, **layers()).eval(), (torch.randn(1, 8, 112, 112),)).graph_module
    machine: Machine = Target.parse("x86-64-v3").machine
    PassManager(PIPELINE).run(module, PassContext(machine=machine, threads=2))
    node = next(node for node, graph in region.regions(module) if region.row_means(graph) is not None)
    plan = module.meta["sepc_memory"]
    spans = []
    for owner in (*region.owners(node), *(value for value in region.inputs(node) if value in plan.arena_offsets)):
        begin = plan.arena_offsets[owner]
        spans.append((begin, begin + 4 * owner.meta["val"].numel()))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
