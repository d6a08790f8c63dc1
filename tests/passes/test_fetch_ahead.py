"""fetch-ahead: which regions fetch what for which, where that lies, and that results do not change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import sepc
from sepc.backends.regions import lower
from sepc.cost_model import search
from sepc.cost_model.ahead import dense_blocks
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.tiling import Ahead, StrassenTiling
from sepc.ir import region
from sepc.passes.choose_tiling import choice, region_problem
from sepc.passes.fetch_ahead import FetchAhead
from sepc.passes.manager import PassContext, PassManager
from sepc.runtime.executable import Executable
from sepc.runtime.program import CONSTANTS, KernelCall
from tests.helpers import passes_until

X = torch.randn(1, 64, 14, 14, generator=torch.Generator().manual_seed(0))


def classifier(classes: int = 1000, *, groups: int = 1, middle: int = 128) -> nn.Module:
    """Two layers that compute, and one or two that read their weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, middle, 3, 1, 1), nn.ReLU(), nn.Conv2d(middle, 256, 1, groups=groups), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes)).eval()


def small_head() -> nn.Module:
    """A layer with a window, and one that reads its weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(64, 256, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 1000)).eval()


def planned(model: nn.Module, x: torch.Tensor = X) -> tuple[fx.GraphModule, PassContext]:
    """The graph of `model` after fetch-ahead."""
    return passes_until("fetch-ahead", model, x)


def fetched(module: fx.GraphModule) -> dict[str, tuple[Ahead, ...]]:
    """What each region fetches, by its name."""
    blocks = {node.name: dense_blocks(choice(node).tiling) for node, _ in region.regions(module)}
    return {name: own.ahead for name, own in blocks.items() if own is not None and own.ahead}


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    def text(module: fx.GraphModule) -> str:
        return "".join(f"{node.name}\n    {choice(node)}\n" for node, _ in region.regions(module))

    before, _ = passes_until("choose-tiling", classifier(), X)
    after, context = planned(classifier())
    notes = [note.message for note in context.notes if note.pass_name == "fetch-ahead"]
    golden(
        "passes/fetch_ahead", f"# before\n{text(before)}\n# after\n{text(after)}\n# notes\n" + "\n".join(notes) + "\n"
    )


def test_the_nearest_region_fetches_first_and_those_before_it_the_rest() -> None:
    module, _ = planned(classifier(4000))
    found = fetched(module)
    assert len(found) == 2
    (first,), (second,) = found.values()
    assert second.skipped_bytes == 4 * 256, "the bias lies between"
    between = 4 * (128 + 128 * 256 + 256)  # The first layer's bias, and what the second has.
    assert first.skipped_bytes == between + second.fetched_bytes
    assert first.fetched_bytes + second.fetched_bytes <= 4 * 256 * 4000


def test_one_region_fetches_for_several_as_long_as_it_is_idle() -> None:
    module, _ = planned(nn.Sequential(*classifier(1024), nn.ReLU(), nn.Linear(1024, 1024)))
    *_, (next_one, one_later) = fetched(module).values()
    assert next_one == Ahead(4 * 256 * 1024, 4 * 256)
    assert one_later.skipped_bytes == next_one.skipped_bytes + next_one.fetched_bytes + 4 * 1024


@pytest.mark.parametrize(
    ("model", "x"),
    [
        pytest.param(classifier(100), X, id="few weights are not worth it"),
        pytest.param(classifier(groups=2, middle=64)[2:], X, id="blocks of each group would fetch the same"),
        pytest.param(small_head(), torch.randn(2, 64, 14, 14), id="so would those of each image"),
        pytest.param(classifier()[4:], torch.randn(1, 256, 14, 14), id="nothing computes before"),
        pytest.param(nn.Conv2d(64, 2048, 3, padding=1), X, id="it computes for longer than it reads"),
    ],
)
def test_nothing_is_fetched_where(model: nn.Module, x: torch.Tensor) -> None:
    module, context = planned(model, x)
    assert not fetched(module)
    assert not [note for note in context.notes if note.pass_name == "fetch-ahead"]


def test_nothing_is_fetched_on_a_gpu() -> None:
    module, _ = passes_until("choose-tiling", classifier(), X)
    context = PassContext(machine=GpuMachine.load("sm_80"), threads=1, example_inputs=(X,))
    PassManager([FetchAhead()]).run(module, context)
    assert not fetched(module)


def test_what_is_fetched_is_where_the_waiting_kernel_has_its_weights() -> None:
    model = classifier()
    compiled = sepc.compile(model, target="x86-64-v3", example_inputs=(X,), num_threads=1)
    module = compiled.graph_module
    ((name, (ahead,)), *_) = reversed(fetched(module).items())
    executable = compiled._last().executable
    assert isinstance(executable, Executable)
    own, waiting = (constants_of(executable, one) for one in (name, list(region.regions(module))[-1][0].name))
    end = own[0] + 4 * 128 * 256
    alignment = 64 * len(own)
    assert 0 <= waiting[0] - (end + ahead.skipped_bytes) <= alignment


@pytest.mark.parametrize("index", [0, 1], ids=["by products", "plain"])
def test_the_kernel_of_a_region_that_fetches_ahead_does_so(index: int) -> None:
    kernels = []
    for last in ("choose-tiling", "fetch-ahead"):
        module, _ = passes_until(last, classifier(4000), X)
        node, graph = list(region.regions(module))[index]
        (kernel,) = lower(graph, region_problem(node, graph), choice(node).tiling, lanes=8)
        kernels.append(str(kernel.function))
    before, after = (text.count("address_of") for text in kernels)
    assert after > before > 0


def constants_of(executable: Executable, name: str) -> list[int]:
    """Where in the constants a region's kernel has its own."""
    first, _ = executable.program.calls[name]
    (call,) = [
        one
        for step in executable.program.steps
        for one in (step if isinstance(step, list) else [])
        if isinstance(one, KernelCall) and one.number == first
    ]
    return [pointer.offset_bytes for pointer in call.arguments if pointer.block == CONSTANTS]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("halves", [False, True])
def test_results_are_right(halves: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if halves:
        monkeypatch.setattr(search, "LEAST_GAIN", 0.1)
    # Of shapes that no other test has, as choices are kept.
    width = 472 if halves else 456
    layers = [nn.Conv2d(width, width, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(1, width, 28, 28, generator=torch.Generator().manual_seed(1))
    compiled = sepc.compile(model, target="x86-64-v3", num_threads=threads, example_inputs=(x,))
    tilings = [choice(node).tiling for node, _ in region.regions(compiled.graph_module)]
    fetching = [one for one in tilings if (blocks := dense_blocks(one)) is not None and blocks.ahead]
    assert {isinstance(one, StrassenTiling) for one in fetching} == {halves}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
