"""plan-memory: storages that live at the same time never overlap, and memory is reused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sepc
from sepc.ir import region
from sepc.ir.layout import Layout, layout
from sepc.passes.plan_memory import ALIGNMENT_BYTES, MemoryPlan, plan_memory, storage_bytes
from tests.helpers import Function, passes_until

MODE = FakeTensorMode()


@dataclass(frozen=True)
class Step:
    """One node of a random graph: a region, or a view of the first source. `sources` count back from it."""

    is_view: bool
    elements: int
    sources: tuple[int, ...]
    is_result: bool


STEPS = st.lists(
    st.builds(
        Step,
        is_view=st.booleans(),
        elements=st.integers(0, 300),
        sources=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
        is_result=st.integers(0, 9).map(lambda draw: draw == 0),
    ),
    min_size=1,
    max_size=25,
)


def build(steps: list[Step]) -> fx.GraphModule:
    """A graph with layouts, as plan-layout leaves it."""
    graph, root = fx.Graph(), nn.Module()
    nodes = [graph.placeholder("x")]
    _annotate(nodes[0], 64, None)
    for index, step in enumerate(steps):
        sources = tuple(nodes[max(0, len(nodes) - back)] for back in step.sources)
        if step.is_view:
            node = graph.call_function(torch.ops.aten.alias.default, sources[:1])
            _annotate(node, sources[0].meta["val"].numel(), sources[0])
        else:
            setattr(root, f"region_{index}", nn.Identity())
            node = graph.call_module(f"region_{index}", sources)
            node.meta["sepc_region"] = region.RegionInfo("elementwise")
            _annotate(node, step.elements, None)
        nodes.append(node)
    results = [node for node, step in zip(nodes[1:], steps, strict=True) if step.is_result]
    graph.output(tuple(results or nodes[-1:]))
    return fx.GraphModule(root, graph)


def _annotate(node: fx.Node, elements: int, source: fx.Node | None) -> None:
    with MODE:
        node.meta["val"] = torch.empty(elements)
    node.meta["sepc_layout"] = Layout((1,), 0, node if source is None else layout(source).base)


def lifetimes(module: fx.GraphModule) -> dict[fx.Node, tuple[int, int]]:
    """First write and last read of each storage, found the slow way: by following every value to its base."""
    spans: dict[fx.Node, tuple[int, int]] = {}
    for index, node in enumerate(module.graph.nodes):
        touched = [node, *node.all_input_nodes] if node.op != "output" else node.all_input_nodes
        for base in {layout(value).base for value in touched}:
            spans[base] = (spans.get(base, (index, index))[0], index)
    return spans


def check(module: fx.GraphModule, plan: MemoryPlan) -> None:
    spans, placed = lifetimes(module), list(plan.arena_offsets.items())
    for index, (node, offset) in enumerate(placed):
        assert offset % ALIGNMENT_BYTES == 0
        assert offset >= 0
        assert offset + storage_bytes(node) <= plan.arena_bytes
        for other, start in placed[:index]:
            (begin, end), (other_begin, other_end) = spans[node], spans[other]
            if begin <= other_end and other_begin <= end:
                assert offset + storage_bytes(node) <= start or start + storage_bytes(other) <= offset
    assert plan.arena_bytes <= plan.unshared_bytes
    for index, node in enumerate(module.graph.nodes):
        if region.is_region(node):
            alive = [one for one in plan.arena_offsets if spans[one][0] <= index <= spans[one][1]]
            ends = [plan.arena_offsets[one] + storage_bytes(one) for one in alive]
            assert plan.in_use_bytes[node] == max(ends, default=0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(STEPS)
def test_no_two_storages_that_live_at_the_same_time_overlap(steps: list[Step]) -> None:
    module = build(steps)
    plan = plan_memory(module)
    check(module, plan)
    owners = {layout(node).base for node in region.results(module)}
    assert set(plan.results) == {owner for owner in owners if region.is_region(owner)}
    assert not owners & plan.arena_offsets.keys()
    regions = {node for node in module.graph.nodes if region.is_region(node)}
    assert regions == {*plan.results, *plan.arena_offsets}


def chain(length: int, elements: int = 160) -> list[Step]:
    return [Step(False, elements, (1,), False)] * length


def test_a_chain_needs_two_storages_whatever_its_length() -> None:
    plans = [plan_memory(build(chain(length))) for length in (3, 4, 20)]
    assert plans[0].arena_bytes == plans[1].arena_bytes == plans[2].arena_bytes
    assert plans[2].unshared_bytes == 19 / 2 * plans[2].arena_bytes


def test_a_view_prolongs_the_life_of_its_base() -> None:
    steps = [*chain(1), Step(True, 0, (1,), False), *chain(2), Step(False, 16, (1, 3), False), *chain(1)]
    module = build(steps)
    plan = plan_memory(module)
    base, first, second = [node for node in module.graph.nodes if region.is_region(node)][:3]
    assert len({plan.arena_offsets[node] for node in (base, first, second)}) == 3


def test_an_empty_graph_needs_no_memory() -> None:
    plan = plan_memory(build([Step(True, 0, (1,), True)]))
    assert (plan.arena_bytes, plan.results, dict(plan.arena_offsets)) == (0, (), {})


def test_views_of_one_result_share_its_storage() -> None:
    def views(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.relu()
        return y[:1], y[1:], y

    module, _ = passes_until("plan-memory", Function(views), torch.randn(2, 3))
    plan = module.meta["sepc_memory"]
    assert len(plan.results) == 1
    assert plan.arena_bytes == 0


def test_a_real_network_shares_most_of_its_memory() -> None:
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(6)]
    module, context = passes_until("plan-memory", nn.Sequential(*blocks), torch.randn(1, 8, 8, 8))
    plan = module.meta["sepc_memory"]
    check(module, plan)
    assert plan.arena_bytes < plan.unshared_bytes / 2
    assert any("arena of" in note.message for note in context.notes)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_survive_the_reuse_of_the_arena(threads: int) -> None:
    model = Function(lambda self, x: [x.exp().cumsum(1), x.softmax(0) + 1, x.exp()[:, 1:]]).eval()
    x = torch.randn(5, 7)
    results = sepc.compile(model, num_threads=threads)(x)
    for result, reference in zip(results, model(x), strict=True):
        torch.testing.assert_close(result, reference)
