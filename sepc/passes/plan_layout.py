"""plan-layout: decide the strides of every value, and make the copies explicit that this takes.

Pattern. Every value at the top level of a grouped graph.

Rules, in execution order:
- an input has the strides it comes with; a view has those that PyTorch gives a view of its input;
- a region with channels writes them innermost (channels-last); an elementwise region follows its first full operand;
- a region that TVM or PyTorch runs writes densely in logical order, and TVM also reads so.

Preconditions that a copy (a region with one ``aten.clone``) establishes where they do not hold: a depthwise or grouped
convolution, a pooling and a normalisation read channels with stride 1, a product of two tensors the rows of the right
one; a view exists for the strides at hand; a result of the graph has the strides that PyTorch would give it, and is not
a constant, which the caller could overwrite.

    %c = region_0_convolution(%x)            layout channels-last
    %v = view(%c, [1, 75])                   no such view        →    %k = region_2_copy(%c);  %v = view(%k, [1, 75])
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sepc.errors import VerificationError
from sepc.ir import layers, ops, region
from sepc.ir.anchors import anchor_of
from sepc.ir.layout import Layout, layout, same_strides
from sepc.ir.links import chain_order
from sepc.ir.origin import derive
from sepc.ir.problem import channels_last_order, contiguous_strides, result_order
from sepc.ir.views import is_view, view_layout
from sepc.passes.manager import PassContext

aten = torch.ops.aten


@dataclass(frozen=True)
class PlanLayout:
    """Annotates every top-level tensor with its `Layout` and inserts copies where needed."""

    name: ClassVar[str] = "plan-layout"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Annotate and rewrite `graph_module`; always counts as a change."""
        copies = _Copies(graph_module, self.name, context.types)
        for node in list(graph_module.graph.nodes):
            if node.op == "output":
                _plan_output(node, copies)
            elif region.is_region(node):
                _plan_region(node, copies)
            elif is_view(node):
                _plan_view(node, copies)
            elif node.op in ("placeholder", "get_attr"):
                node.meta["sepc_layout"] = Layout(ops.strides(node), 0, node)
            elif isinstance(node.meta["val"], torch.Tensor):  # one of several results of a region
                node.meta["sepc_layout"] = _result_layout(node, _result_order(graph_module, node.all_input_nodes[0]))
        if copies.count:
            context.note(self.name, graph_module.graph.output_node(), f"{copies.count} copies inserted", taken=True)
        return True


@dataclass
class _Copies:
    """Inserts copies, each a region with one ``aten.clone``."""

    graph_module: fx.GraphModule
    pass_name: str
    types: Collection[torch.dtype]
    count: int = 0

    def insert(self, value: fx.Node, strides: tuple[int, ...], before: fx.Node) -> fx.Node:
        """A copy of `value` with `strides`, placed before node `before`."""
        graph = self.graph_module.graph
        with graph.inserting_before(before):
            clone = graph.call_function(aten.clone.default, (value,))
        clone.meta["val"] = value.meta["val"]
        clone.meta["sepc_origin"] = derive(self.pass_name, [value])
        name = f"region_copy_{self.count}_{value.name}"
        self.count += 1
        elementwise = ops.dtype(value) in self.types and 0 not in ops.shape(value)
        reason = f"of {ops.dtype(value)}"
        kind = region.RegionInfo("copy") if elementwise else region.RegionInfo("copy", "torch", reason)
        node = region.extract(self.graph_module, [clone], name, kind, self.pass_name)
        node.meta["sepc_layout"] = Layout(strides, 0, node)
        return node


def _require(node: fx.Node, index: int, strides: tuple[int, ...], copies: _Copies) -> None:
    """Have argument `index` of `node` come with `strides`, by a copy if it does not."""
    value = region.inputs(node)[index]
    if not same_strides(ops.shape(value), layout(value).strides, strides):
        node.update_arg(index, copies.insert(value, strides, node))


def _plan_region(node: fx.Node, copies: _Copies) -> None:
    graph = region.submodule(copies.graph_module, node)
    kind = region.info(node)
    if kind.kernel != "sepc":
        _plan_foreign_region(node, copies)
        return
    anchor, _ = anchor_of(graph)
    if layers.Product.matches(anchor):
        _require_rows(node, region.placeholders(graph), layers.Product.of(anchor).right, copies)
    if _reads_channel_vectors(graph):
        _require_channel_vectors(node, graph, copies)
    if isinstance(node.meta["val"], torch.Tensor):
        node.meta["sepc_layout"] = _result_layout(node, _result_order(copies.graph_module, node))


def _result_layout(node: fx.Node, order: Sequence[int] | None) -> Layout:
    return Layout(contiguous_strides(ops.shape(node), order), 0, node)


def _result_order(graph_module: fx.GraphModule, node: fx.Node) -> tuple[int, ...] | None:
    """The order in memory in which the region `node` writes its results' dimensions; None: as they come."""
    graph, kind = region.submodule(graph_module, node), region.info(node)
    if kind.kernel != "sepc":
        return None
    given = [layout(value).strides for value in region.inputs(node)]
    if kind.kind == "chain":
        return chain_order(graph)
    if kind.kind == "concatenation":
        return _concatenation_order(graph, given)
    return result_order(graph, dict(zip(region.placeholders(graph), given, strict=True)))


def _plan_foreign_region(node: fx.Node, copies: _Copies) -> None:
    """A region that TVM or PyTorch runs reads and writes densely in logical order."""
    for index, value in enumerate(region.inputs(node)):
        _require(node, index, contiguous_strides(ops.shape(value)), copies)
    if isinstance(node.meta["val"], torch.Tensor):
        node.meta["sepc_layout"] = _result_layout(node, None)


def _require_channel_vectors(node: fx.Node, graph: fx.GraphModule, copies: _Copies) -> None:
    """Have the first argument of `node` come with its channels (of a normalisation: the last dimension) at stride 1."""
    value = region.inputs(node)[0]
    shape = ops.shape(value)
    is_last = any(
        accessor.matches(anchor_of(graph)[0]) for accessor in (layers.LayerNorm, layers.RMSNorm, layers.Softmax)
    )
    order = tuple(range(len(shape))) if is_last else channels_last_order(len(shape))
    if shape[order[-1]] != 1 and layout(value).strides[order[-1]] != 1:
        _require(node, 0, contiguous_strides(shape, order), copies)


def _require_rows(node: fx.Node, inner: Sequence[fx.Node], factor: fx.Node, copies: _Copies) -> None:
    """Have the right factor of a product come with its rows dense; `inner` are the region's own names of its inputs."""
    if factor in inner and ops.shape(factor)[-1] != 1:
        index = inner.index(factor)
        value = region.inputs(node)[index]
        if layout(value).strides[-1] != 1:
            _require(node, index, contiguous_strides(ops.shape(value)), copies)


def _reads_channel_vectors(graph: fx.GraphModule) -> bool:
    """Whether the region's first operator loads vectors of neighbouring channels."""
    anchor, _ = anchor_of(graph)
    if layers.Conv.matches(anchor):
        return layers.Conv.of(anchor).groups > 1
    if layers.ConvTranspose.matches(anchor):
        return layers.ConvTranspose.of(anchor).groups > 1
    by_vectors = (layers.Pool, ops.Mean, layers.GroupNorm, layers.LayerNorm, layers.RMSNorm, layers.Softmax)
    return any(accessor.matches(anchor) for accessor in by_vectors)


def _concatenation_order(graph: fx.GraphModule, given: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The memory order of the largest input."""
    inputs = region.placeholders(graph)
    largest = max(range(len(inputs)), key=lambda index: ops.tensor(inputs[index]).numel())
    return tuple(sorted(range(len(given[largest])), key=lambda dim: given[largest][dim], reverse=True))


def _plan_view(node: fx.Node, copies: _Copies) -> None:
    source = node.all_input_nodes[0]
    planned = _view_of(node, source)
    if planned is None:
        copy = copies.insert(source, contiguous_strides(ops.shape(source)), node)
        node.replace_input_with(source, copy)
        planned = _view_of(node, copy)
    if planned is None:
        raise VerificationError("A view exists of no layout of its input", where=node.name, why=str(node.target))
    node.meta["sepc_layout"] = planned


def _view_of(node: fx.Node, source: fx.Node) -> Layout | None:
    of = layout(source)
    found = view_layout(node, ops.shape(source), of.strides, of.offset, ops.dtype(source))
    return None if found is None else Layout(found[0], found[1], of.base)


def _plan_output(node: fx.Node, copies: _Copies) -> None:
    """Have each result come with the strides that it has in PyTorch, and in memory that the caller may overwrite."""
    copied: dict[fx.Node, fx.Node] = {}
    results = region.results(copies.graph_module)
    for value in results:
        given = layout(value)
        fits = same_strides(ops.shape(value), given.strides, ops.strides(value))
        if value not in copied and not (fits and given.base.op != "get_attr"):
            copied[value] = copies.insert(value, ops.strides(value), node)
    node.args = (tuple(copied.get(value, value) for value in results),)
