"""recompute: what is computed for each of its readers, what is not, and what the decision weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import sepc
from sepc.errors import VerificationError
from sepc.frontend.export import capture
from sepc.ir import region
from sepc.ir.printer import print_graph
from sepc.ir.problem import Problem
from sepc.passes import fuse, recompute
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.recompute import Recompute
from tests.helpers import Function, passes_until

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
Layers = Callable[[Function, torch.Tensor], Any]


def layers() -> dict[str, nn.Module]:
    return {
        "first": nn.Conv2d(4, 5, 1),
        "depth": nn.Conv2d(5, 5, 3, 1, 1, groups=5),
        "point": nn.Conv2d(5, 6, 1),
        "other": nn.Conv2d(5, 7, 1),
    }


def two_branches(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A ReLU read by a depthwise and a pointwise convolution; what it reads is read elsewhere too."""
    y = self.first(x)
    r = y.relu()
    return self.depth(r), self.point(r), y.exp()


def rewritten(function: Layers) -> tuple[fx.GraphModule, PassContext]:
    """The graph after recompute, verified against the one before."""
    module, context = passes_until("group", Function(function, **layers()), X)
    PassManager([Recompute()], verify_each=True).run(module, context)
    return module, context


def relus(module: fx.GraphModule) -> int:
    """Calls of regions that compute a ReLU and nothing else."""
    return sum(
        [str(one.target) for one in region.computations(graph)] in (["aten.relu.default"], ["aten.clamp_min.default"])
        for _, graph in region.regions(module)
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel costs the same, however many links it has."""
    monkeypatch.setattr(recompute, "piece_time_us", lambda links, planner: 1.0)


def priced(prices: dict[tuple[str, ...], float]) -> Callable[..., float]:
    """A cost function: the price of links by their kinds, convolutions by their number of results."""

    def price(links: Sequence[Problem], *_: Any) -> float:
        return prices[tuple(str(getattr(link.stage, "taps", "map")) for link in links)]

    return price


@pytest.mark.usefixtures("free")
def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    before, _ = passes_until("group", Function(two_branches, **layers()), X)
    after, _ = rewritten(two_branches)
    assert (relus(before), relus(after)) == (1, 2)
    texts = [print_graph(module, sources=False) for module in (before, after)]
    golden("passes/recompute", "# before\n{}\n# after\n{}".format(*texts))


@pytest.mark.usefixtures("free")
def test_the_graph_computes_the_same() -> None:
    model = Function(two_branches, **layers()).eval()
    module, _ = passes_until("recompute", model, X)
    for found, expected in zip(module(X), model(X), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("free")
def test_each_reader_computes_the_value_in_a_chain_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "piece_time_us", lambda links, planner, objective: 1.0)
    model = Function(two_branches, **layers()).eval()
    compiled = sepc.compile(model, num_threads=2, example_inputs=(X,))
    chains = [one.ops for one in compiled.regions if one.kind == "chain"]
    assert len(chains) == 2
    assert all(operators[0] in ("relu.default", "clamp_min.default") for operators in chains)
    with torch.no_grad():
        for found, expected in zip(compiled(X), model(X), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def one_reader(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = self.first(x)
    return self.depth(y.relu()), y.exp()


def read_by_it_alone(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = self.depth(self.first(x))
    return self.point(y), self.other(y)


def no_image(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = self.first(x).mean((2, 3), keepdim=True)
    return self.point(y), self.other(y)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(one_reader, id="one reader"),
        pytest.param(read_by_it_alone, id="what it reads might be one chain with it"),
        pytest.param(no_image, id="no image of several rows"),
    ],
)
def test_what_is_not_computed_twice(function: Layers) -> None:
    before, _ = passes_until("group", Function(function, **layers()), X)
    after, _ = rewritten(function)
    assert len(list(region.regions(after))) == len(list(region.regions(before)))


@pytest.mark.parametrize(
    ("chains", "copies", "noted"),
    [
        pytest.param((5.0, 5.0), 1, {"not computed for 2 of 2 readers: no gain": -2.0}, id="twice costs more"),
        pytest.param((3.5, 3.5), 2, {"computed for 2 of 2 readers": 1.0}, id="twice costs less"),
        pytest.param(
            (2.5, 9.0),
            2,
            {"not computed for 2 of 2 readers: no gain": -3.5, "computed for 1 of 2 readers": 0.5},
            id="one gains in any case, the other reads what is stored",
        ),
        pytest.param(
            (1.0, 5.5),
            2,
            {"not computed for 2 of 2 readers: other ways gain more": 1.5, "computed for 1 of 2 readers": 2.0},
            id="one gains more than both",
        ),
    ],
)
def test_the_cheapest_way_is_taken(
    chains: tuple[float, float], copies: int, noted: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = {("map",): 2.0, ("9",): 3.0, ("1",): 3.0, ("map", "9"): chains[0], ("map", "1"): chains[1]}
    monkeypatch.setattr(recompute, "piece_time_us", priced(prices))
    module, context = rewritten(two_branches)
    assert relus(module) == copies
    notes = [note for note in context.notes if note.pass_name == "recompute"]
    assert {note.message: note.gain_us for note in notes} == noted
    assert all(note.taken != note.message.startswith("not") for note in notes)


def test_a_reader_that_could_be_no_link_keeps_the_value_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def and_a_sum(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.first(x)
        r = y.relu()
        return self.depth(r), r * self.depth(y), y.exp()

    prices = {("map",): 2.0, ("9",): 3.0, ("map", "9"): 3.5, ("1",): 9.0, ("1", "9"): 12.0}
    monkeypatch.setattr(recompute, "piece_time_us", priced(prices))
    assert relus(rewritten(and_a_sum)[0]) == 1


def test_the_pass_needs_a_machine() -> None:
    with pytest.raises(VerificationError, match="needs a machine"):
        Recompute().run(capture(nn.ReLU(), (X,)).graph_module, PassContext())
