"""fuse: what becomes a chain, why something does not, that the cheapest way is taken, and the way of least memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import sepc
from sepc.errors import VerificationError
from sepc.frontend.export import capture
from sepc.ir import layers, region
from sepc.ir.printer import print_graph
from sepc.ir.problem import Problem
from sepc.passes import fuse
from sepc.passes.fuse import LONGEST, Fuse
from sepc.passes.live_bytes import LiveBytes
from sepc.passes.manager import PassContext, PassManager
from tests.helpers import Function, passes_until

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels)


def fused(model: nn.Module, x: torch.Tensor = X, **options: Any) -> tuple[fx.GraphModule, PassContext]:
    """The graph of `model` after fuse, verified against the one before."""
    module, context = passes_until("group", model, x)
    PassManager([Fuse(**options)], verify_each=True).run(module, context)
    return module, context


def links(module: fx.GraphModule) -> list[int]:
    """The number of convolutions in each region."""
    return [
        sum(layers.Conv.matches(node) for node in region.computations(graph)) for _, graph in region.regions(module)
    ]


def messages(context: PassContext) -> list[str]:
    return [note.message for note in context.notes if note.pass_name == "fuse"]


@pytest.fixture
def always_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest kernels win, whatever they cost."""
    monkeypatch.setattr(fuse, "piece_time_us", lambda links, planner, objective: 1.0)


class InvertedResidual(nn.Module):
    """1×1, depthwise, 1×1, and the input added."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(pointwise(4, 16), nn.ReLU6(), depthwise(16), nn.ReLU6(), pointwise(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


# ---- what is joined


@pytest.mark.usefixtures("always_fuse")
def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    before, _ = passes_until("group", InvertedResidual(), X)
    after, _ = fused(InvertedResidual())
    assert links(after) == [3]
    texts = [print_graph(module, sources=False) for module in (before, after)]
    golden("passes/fuse", "# before\n{}\n# after\n{}".format(*texts))


@pytest.mark.usefixtures("always_fuse")
def test_the_graph_computes_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.SiLU(), depthwise(6), pointwise(6, 9), depthwise(9, 2)).eval()
    module, _ = fused(model)
    assert sum(links(module)) == 4
    assert max(links(module)) > 1
    torch.testing.assert_close(module(X)[0], model(X), rtol=1e-4, atol=1e-5)


# ---- what is not


def reads_twice(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.point(x)
    return self.depth(y).relu() + y


def two_readers(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = self.point(x)
    return self.depth(y), y * 2


@pytest.mark.usefixtures("always_fuse")
@pytest.mark.parametrize(
    ("function", "x"),
    [
        pytest.param(lambda self, x: self.depth(self.point(x)), X[:, :, :1], id="one row only"),
        pytest.param(two_readers, X, id="somebody else reads the value, too"),
        pytest.param(reads_twice, X, id="the reader does not only convolve it"),
        pytest.param(lambda self, x: self.point(x) + self.depth(x), X, id="the reader does not convolve it"),
        pytest.param(lambda self, x: self.depth(self.point(x).transpose(2, 3)), X, id="a view in between"),
        pytest.param(lambda self, x: self.depth(self.pool(self.point(x))), X, id="an adaptive pooling in between"),
        pytest.param(lambda self, x: self.norm(self.point(x)), X, id="normalised along another dimension"),
        pytest.param(lambda self, x: self.line(self.line(x[0])), X, id="images without rows"),
        pytest.param(lambda self, x: self.depth(x).softmax(1), X, id="no convolution"),
    ],
)
def test_what_is_not_joined(function: Callable[..., Any], x: torch.Tensor) -> None:
    layers = {
        "point": pointwise(4, 4),
        "depth": depthwise(4),
        "pool": nn.AdaptiveAvgPool2d(4),
        "line": nn.Conv1d(8, 8, 3),
        "norm": nn.LayerNorm(8),
    }
    module, _ = fused(Function(function, **layers), x)
    assert not [node for node, _ in region.regions(module) if region.info(node).kind == "chain"]


@pytest.mark.usefixtures("always_fuse")
@pytest.mark.parametrize("objective", ["time", "memory"])
def test_chains_have_at_most_so_many_links(objective: Any) -> None:
    model = nn.Sequential(*(depthwise(4) for _ in range(11)))
    module, _ = fused(model, torch.randn(1, 4, 64, 64), objective=objective)
    assert sum(links(module)) == 11
    assert max(links(module)) == LONGEST[objective]


def test_the_pass_needs_a_machine() -> None:
    with pytest.raises(VerificationError, match="needs a machine"):
        Fuse().run(capture(nn.ReLU(), (X,)).graph_module, PassContext())


# ---- the cheapest way


def priced(prices: dict[tuple[int, ...], float]) -> Callable[..., float]:
    """A cost function: the price of a piece by the numbers of output channels of its links."""

    def time_us(links: Sequence[Problem], *_: Any) -> float:
        return prices[tuple(link.stage.out_channels for link in links)]

    return time_us


CHANNELS = nn.Sequential(pointwise(4, 5), nn.Conv2d(5, 6, 3, 1, 1), pointwise(6, 7))


@pytest.mark.parametrize(
    ("prices", "expected"),
    [
        ({(5,): 1, (6,): 1, (7,): 1, (5, 6): 3, (6, 7): 3, (5, 6, 7): 4}, [1, 1, 1]),
        ({(5,): 2, (6,): 2, (7,): 2, (5, 6): 3, (6, 7): 3, (5, 6, 7): 4}, [3]),
        ({(5,): 2, (6,): 2, (7,): 2, (5, 6): 3, (6, 7): 2, (5, 6, 7): 5}, [1, 2]),
        ({(5,): 2, (6,): 2, (7,): 2, (5, 6): 1, (6, 7): 1, (5, 6, 7): 4}, None),
    ],
)
def test_the_cheapest_way_is_taken(
    prices: dict[tuple[int, ...], float], expected: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse, "piece_time_us", priced(prices))
    found = links(fused(CHANNELS)[0])
    assert found == expected if expected else found in ([1, 2], [2, 1])


def test_what_is_taken_and_what_is_not_are_noted_with_their_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = {(5,): 2, (6,): 2, (7,): 2, (5, 6): 5, (6, 7): 2, (5, 6, 7): 4.5}
    monkeypatch.setattr(fuse, "piece_time_us", priced(prices))
    notes = [note for note in fused(CHANNELS)[1].notes if note.pass_name == "fuse"]
    assert [(note.taken, note.message, note.gain_us, len(note.nodes)) for note in notes] == [
        (False, "not fused: no gain", -1.0, 2),
        (False, "not fused: other cuts of the sequence gain more", 1.5, 3),
        (True, "one kernel, region_0_chain", 2.0, 2),
    ]
    assert [note.nodes[0].split("_")[1] for note in notes] == ["0", "0", "1"]


# ---- memory


def test_live_bytes() -> None:
    module, _ = passes_until("group", InvertedResidual(), X)
    first, second, last = (node for node, _ in region.regions(module))
    live = LiveBytes.of(module)
    inner = 4 * 16 * 8 * 8
    assert live.during([first]) == inner
    assert live.during([second]) == 2 * inner
    assert live.during([last]) == inner  # the result is not in the arena
    assert live.during([first, second]) == inner
    assert live.during([first, second, last]) == 0


def test_values_that_wait_count_also_through_views() -> None:
    def waits(self: Function, x: torch.Tensor) -> torch.Tensor:
        early = self.point(x)
        late = self.depth(self.pool(x))
        return late + early[:, :, ::2, ::2]

    layers = {"point": pointwise(4, 4), "depth": depthwise(4), "pool": nn.MaxPool2d(2)}
    module, _ = passes_until("group", Function(waits, **layers), X)
    pool = next(node for node, _ in region.regions(module) if region.info(node).kind == "pooling")
    assert LiveBytes.of(module).during([pool]) == X.numel() * 4 + X.numel()


def test_memory_comes_first_and_then_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "piece_time_us", lambda links, *_: float(len(links) ** 2))  # the more links, the worse
    wide = nn.Sequential(pointwise(4, 64), depthwise(64, 2), pointwise(64, 4), depthwise(4), pointwise(4, 4))
    x = torch.randn(1, 4, 64, 64)
    assert links(fused(wide, x)[0]) == [1] * 5
    module, context = fused(wide, x, objective="memory")
    # What is wide lies inside one kernel; what follows takes less memory than that anyway.
    assert links(module) == [3, 1, 1]
    assert any("limit" in message for message in messages(context))


def test_a_model_compiled_for_memory_needs_less_and_is_right() -> None:
    blocks = [nn.Conv2d(3, 8, 3, 2, 1)]
    blocks += [nn.Sequential(pointwise(8, 48), nn.ReLU6(), depthwise(48), nn.ReLU6(), pointwise(48, 8)) for _ in "ab"]
    model = nn.Sequential(*blocks).eval()
    x = torch.randn(1, 3, 64, 64)
    quick = sepc.compile(model, num_threads=2, example_inputs=(x,))
    small = sepc.compile(model, num_threads=2, example_inputs=(x,), optimize="memory")
    assert small.arena_bytes < 4 * 48 * 32 * 32
    assert small.arena_bytes <= quick.arena_bytes
    torch.testing.assert_close(small(x), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_what_to_optimize_is_checked() -> None:
    wrong: Any = "speed"
    with pytest.raises(sepc.InputError, match=r'called \'speed\'[\s\S]*give "time" or "memory"'):
        sepc.compile(nn.ReLU(), optimize=wrong)
