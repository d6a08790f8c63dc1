"""The manager cleans up, types, verifies, times and dumps; rules are undone where they do not fit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import fx, nn

from sepc.errors import VerificationError
from sepc.frontend.export import capture
from sepc.ir.ops import aten, shape
from sepc.ir.types import fake_mode
from sepc.passes.manager import PassContext, PassManager, PassRecord, finish, verification_inputs
from sepc.passes.observers import Observer
from sepc.passes.rewriter import Rewriter, Rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from sepc.passes.manager import Pass

X = torch.randn(1, 3, 6, 6)


def relu_conv() -> fx.GraphModule:
    return capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), (X,)).graph_module


def find(module: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in module.graph.nodes if node.target == target)


@dataclass(frozen=True)
class Do:
    """A pass that does what it is told."""

    name: ClassVar[str] = "do"
    action: Callable[[fx.GraphModule], None] | None = field(default=None)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        if self.action is None:
            return False
        self.action(graph_module)
        context.note(self.name, graph_module.graph.output_node(), "done")
        return True


def drop_relu(module: fx.GraphModule) -> None:
    relu = find(module, aten.relu.default)
    relu.replace_all_uses_with(relu.args[0])


def drop_conv(module: fx.GraphModule) -> None:
    conv = find(module, aten.conv2d.default)
    conv.replace_all_uses_with(conv.args[0])


def negate(module: fx.GraphModule) -> None:
    relu = find(module, aten.relu.default)
    relu.target = aten.neg.default


def swish_instead(module: fx.GraphModule) -> None:
    """Builds a node without a type or an origin."""
    relu = find(module, aten.relu.default)
    with module.graph.inserting_before(relu):
        relu.replace_all_uses_with(module.graph.call_function(aten.silu.default, relu.args))


def malform(module: fx.GraphModule) -> None:
    relu, conv = find(module, aten.relu.default), find(module, aten.conv2d.default)
    conv.prepend(relu)


def malform_conv(module: fx.GraphModule) -> None:
    conv = find(module, aten.conv2d.default)
    conv.args[1].prepend(conv)


def misfit(module: fx.GraphModule) -> None:
    relu = find(module, aten.relu.default)
    relu.target, relu.args = aten.mm.default, (relu.args[0], relu.args[0])


def run(
    action: Callable[[fx.GraphModule], None] | None, **options: object
) -> tuple[fx.GraphModule, PassContext, list[PassRecord]]:
    module, context = relu_conv(), PassContext()
    return module, context, PassManager([Do(action)], **options).run(module, context)


def test_dead_nodes_and_unused_constants_are_removed() -> None:
    module, _, records = run(drop_conv)
    assert not list(module.named_buffers())
    assert (records[0].nodes_before, records[0].nodes_after) == (6, 3)


def test_new_nodes_get_a_type_and_an_origin() -> None:
    module, _, _ = run(swish_instead)
    node = find(module, aten.silu.default)
    assert shape(node) == (1, 4, 4, 4)
    assert node.meta["sepc_origin"].pass_name == "do"
    assert node.meta["sepc_origin"].nodes == ("conv2d",)


def test_types_are_propagated_into_regions() -> None:
    module = relu_conv()
    relu, inner = find(module, aten.relu.default), fx.Graph()
    inner.output(inner.call_function(aten.silu.default, (inner.placeholder("x"),)))
    module.add_submodule("region_0_silu", fx.GraphModule(nn.Module(), inner))
    with module.graph.inserting_before(relu):
        call = module.graph.call_module("region_0_silu", relu.args)
    relu.replace_all_uses_with(call)
    finish(module, "do")
    assert shape(call) == (1, 4, 4, 4)
    assert all(shape(node) == (1, 4, 4, 4) for node in inner.nodes if node.op != "output")


def test_a_record_holds_time_and_the_passes_own_notes() -> None:
    _, context, (record,) = run(drop_relu)
    assert record.name == "do"
    assert record.changed
    assert record.time_ms > 0
    assert [note.message for note in record.notes] == ["done"]
    assert tuple(context.notes) == record.notes
    assert record.max_difference is None


def test_a_note_is_recorded_once() -> None:
    context, node = PassContext(), relu_conv().graph.output_node()
    context.note("do", node, "same")
    context.note("do", node, "same")
    assert len(context.notes) == 1
    context.note("do", node, "same", taken=True, times_us=(3.0, 2.0))
    assert [note.gain_us for note in context.notes] == [None, 1.0]


def test_a_note_names_its_nodes_and_the_line_that_they_come_from() -> None:
    module, context = relu_conv(), PassContext()
    convolution, relu = find(module, aten.conv2d.default), find(module, aten.relu.default)
    context.note("do", [convolution, relu], "both", taken=True)
    (note,) = context.notes
    assert note.nodes == ("conv2d", "relu")
    assert note.source == convolution.meta["sepc_origin"].source != ""


def test_a_rule_notes_what_became_of_what() -> None:
    class Swish(Grow):
        def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
            return build.call(aten.silu.default, match)

    module, context = relu_conv(), PassContext()
    assert Swish([]).apply(find(module, aten.relu.default), "do", module, context)
    assert [(note.nodes, note.message, note.taken) for note in context.notes] == [(("relu",), "relu → silu", True)]


def test_verify_each_finds_a_pass_that_changes_the_result() -> None:
    with pytest.raises(VerificationError, match="do changed the result"):
        run(negate, verify_each=True)
    run(negate)
    with pytest.raises(VerificationError, match="do changed the type of an output"):
        run(drop_conv, verify_each=True)


def test_verify_each_reports_the_difference_on_given_inputs() -> None:
    module = relu_conv()
    context = PassContext(example_inputs=(X,))
    (record,) = PassManager([Do(lambda module: None)], verify_each=True).run(module, context)
    assert record.max_difference == 0.0


def test_a_malformed_graph_and_a_node_that_does_not_fit_are_named() -> None:
    with pytest.raises(VerificationError, match="do left a malformed graph"):
        run(malform)
    with pytest.raises(VerificationError, match=r"(?s)does not fit its inputs.*relu = aten.mm.default"):
        run(misfit)


def test_who_looks_on_is_told_of_every_pass_in_order() -> None:
    seen: list[object] = []

    class Look(Observer):
        def start(self, graph_module: fx.GraphModule) -> None:
            seen.append("start")

        def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
            seen.append((index, one.name, changed))

        def recorded(self, record: PassRecord) -> None:
            seen.append((record.name, len(record.notes)))

        def failed(self, one: Pass, error: Exception) -> None:
            seen.append((one.name, type(error)))

    with pytest.raises(VerificationError):
        PassManager([Do(), Do(drop_relu), Do(malform_conv)], observers=[Look()]).run(relu_conv(), PassContext())
    assert seen == ["start", (1, "do", False), ("do", 0), (2, "do", True), ("do", 1), ("do", VerificationError)]


def test_passes_say_in_the_log_what_they_did_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "sepc.passes"):
        run(drop_relu)
    levels, messages = zip(*((one.levelname, one.getMessage()) for one in caplog.records), strict=True)
    assert levels[-2:] == ("INFO", "DEBUG")
    assert messages[-2].startswith("do: 6 → 5 nodes, ")
    assert messages[-1].startswith("do: output: not taken: done")


def test_verification_inputs_have_the_declared_strides_and_are_the_same_each_time() -> None:
    last = torch.randn(1, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    module = capture(nn.ReLU(), (last,)).graph_module
    (first,), (second,), (given,) = (*[verification_inputs(module)] * 2, verification_inputs(module, (X,)))
    assert first.stride() == last.stride() == given.stride()
    assert torch.equal(first, second)
    assert torch.equal(given, X)


class Grow(Rule[fx.Node]):
    """A wrong rule: it replaces relu by something larger, or by something that does not exist."""

    targets = (aten.relu.default,)

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node:
        return node.args[0]

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        return build.call(aten.expand.default, build.call(aten.neg.default, match), self.sizes)


@pytest.mark.parametrize(
    ("sizes", "reason"), [([2, 4, 4, 4], r"type would change from float32\[1, 4, 4, 4\]"), ([2, 2], "expand")]
)
def test_a_rewrite_that_does_not_fit_is_undone_with_its_reason(sizes: list[int], reason: str) -> None:
    module, context = relu_conv(), PassContext()
    before = str(module.graph)
    assert not Grow(sizes).apply(find(module, aten.relu.default), "do", module, context)
    assert str(module.graph) == before
    assert re.search(reason, context.notes[0].message)


def test_new_constants_do_not_overwrite_old_ones() -> None:
    module = relu_conv()
    relu = find(module, aten.relu.default)
    build = Rewriter(module, "do", fake_mode(module), relu, (relu,))
    names = [build.constant("scale", torch.ones(index)).target for index in range(3)]
    assert names == ["scale", "scale_1", "scale_2"]
    build.undo()
    finish(module, "do")
    assert not hasattr(module, "scale")
