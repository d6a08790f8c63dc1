"""Regions: the unit of code generation. A region is a ``call_module`` node whose submodule is a small ATen graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sepc.errors import VerificationError
from sepc.ir.origin import derive

Kernel = Literal["sepc", "tvm", "torch"]

REGION_KINDS = (
    "convolution",
    "chain",
    "linear",
    "product",
    "pooling",
    "normalization",
    "elementwise",
    "copy",
    "concatenation",
    "other",
)


@dataclass(frozen=True)
class RegionInfo:
    """What a region is, kept in ``node.meta["sepc_region"]``.

    Attributes:
        kind: one of `REGION_KINDS`, named after the op that everything else in the region hangs on.
        kernel: who runs it: a kernel of ours, one lowered by TVM, or PyTorch on the host.
        reason: why it is not a kernel of ours; empty where it is.
    """

    kind: str
    kernel: Kernel = "sepc"
    reason: str = ""

    def __str__(self) -> str:
        """As the printed graph has it."""
        text = self.kind if self.kernel == "sepc" else f"{self.kind} by {self.kernel}"
        return f"{text} ({self.reason})" if self.reason else text


def info(node: fx.Node) -> RegionInfo:
    """The `RegionInfo` of a region's node; raises VerificationError for another node."""
    found = node.meta.get("sepc_region")
    if not isinstance(found, RegionInfo):
        raise VerificationError("Not a region", where=node.name, why="meta['sepc_region'] is missing")
    return found


def is_region(node: fx.Node) -> bool:
    """Whether `node` calls a region."""
    return node.op == "call_module" and "sepc_region" in node.meta


def submodule(graph_module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """The graph of the region that `node` calls; raises VerificationError if there is none."""
    found = getattr(graph_module, str(node.target), None)
    if not isinstance(found, fx.GraphModule):
        raise VerificationError(
            "A region has no graph", where=node.name, why=f"the module has no submodule {node.target!r}"
        )
    return found


def regions(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """All regions of `graph_module` in execution order, each as its node and its graph."""
    for node in graph_module.graph.nodes:
        if is_region(node):
            yield node, submodule(graph_module, node)


def inputs(node: fx.Node) -> list[fx.Node]:
    """The values that a region's node is called with, one per placeholder of its graph."""
    return [value for value in node.args if isinstance(value, fx.Node)]


def elements(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """The results taken from a region with several: each with its position in the tuple that the region returns."""
    taken = []
    for user in node.users:
        position = user.args[1] if user.target is operator.getitem else None
        if isinstance(position, int) and isinstance(user.meta["val"], torch.Tensor):
            taken.append((position, user))
    return taken


def results(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that a whole graph returns, in order; one may come several times."""
    (returned,) = graph_module.graph.output_node().args
    values = returned if isinstance(returned, list | tuple) else (returned,)
    return [value for value in values if isinstance(value, fx.Node)]


def placeholders(region: fx.GraphModule) -> list[fx.Node]:
    """The inputs of a region's graph, in order."""
    return [node for node in region.graph.nodes if node.op == "placeholder"]


def computations(region: fx.GraphModule) -> list[fx.Node]:
    """The ATen calls of a region's graph, in execution order."""
    return [node for node in region.graph.nodes if node.op == "call_function"]


def returned(region: fx.GraphModule) -> list[fx.Node]:
    """The nodes that a region's graph returns: its result, and the means of that over each row if it has two."""
    (value,) = region.graph.output_node().args
    if isinstance(value, fx.Node):
        return [value]
    nodes = [one for one in value if isinstance(one, fx.Node)] if isinstance(value, tuple) else []
    if len(nodes) != 2:
        raise VerificationError("A region returns one node, or two", where=str(value))
    return nodes


def result(region: fx.GraphModule) -> fx.Node:
    """The node that a region's graph returns; of two, the value whose means over each row are the other."""
    return returned(region)[0]


def row_means(region: fx.GraphModule) -> fx.Node | None:
    """The node that is the means of the result of `region` over each row, if it returns them too."""
    values = returned(region)
    return values[1] if len(values) > 1 else None


def owners(node: fx.Node) -> list[fx.Node]:
    """The nodes that stand for what the region `node` returns: itself, or those that take its results apart."""
    if isinstance(node.meta["val"], torch.Tensor):
        return [node]
    return [user for _, user in sorted(elements(node), key=lambda element: element[0])]


def bytes_moved(node: fx.Node, region: fx.GraphModule) -> int:
    """Compulsory traffic of the region that `node` calls, in bytes: inputs, constants and results once."""
    values = [node, *node.all_input_nodes, *region.graph.find_nodes(op="get_attr")]
    tensors = [leaf for value in values for leaf in pytree.tree_leaves(value.meta["val"])]
    return sum(one.numel() * one.dtype.itemsize for one in tensors if isinstance(one, torch.Tensor))


def extract(
    graph_module: fx.GraphModule, nodes: Sequence[fx.Node], name: str, region_info: RegionInfo, pass_name: str
) -> fx.Node:
    """Move `nodes` (in execution order, the last one being the only one used outside) into a region called `name`.

    Constants that the nodes read move along; other inputs become the region's placeholders. Returns the region's node,
    which stands where the last of `nodes` stood.
    """
    inner = fx.Graph()
    owner = torch.nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    outer: list[fx.Node] = []
    members = set(nodes)
    for node in nodes:
        for argument in node.all_input_nodes:
            if argument in members or argument in copies:
                continue
            if argument.op == "get_attr":
                setattr(owner, str(argument.target), getattr(graph_module, str(argument.target)))
                copies[argument] = inner.node_copy(argument)
            else:
                outer.append(argument)
                copies[argument] = inner.placeholder(argument.name)
                copies[argument].meta = _inherited(argument.meta)
    for node in nodes:
        copies[node] = inner.node_copy(node, lambda argument: copies[argument])
    inner.output(copies[nodes[-1]])
    # Placeholders and constants first, as every graph has them.
    for node in [*inner.nodes][::-1]:
        if node.op == "placeholder":
            first = next(iter(inner.nodes))
            if node is not first:
                first.prepend(node)
    return _install(graph_module, fx.GraphModule(owner, inner), nodes, outer, name, region_info, pass_name)


def merge(
    graph_module: fx.GraphModule, nodes: Sequence[fx.Node], name: str, region_info: RegionInfo, pass_name: str
) -> fx.Node:
    """Make one region, called `name`, of the regions `nodes` and the views between them, as `join` does.

    Returns the new region's node, which stands where the last of `nodes` stood.
    """
    joined, outer = join(graph_module, nodes)
    return _install(graph_module, joined, nodes, outer, name, region_info, pass_name)


def join(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """One graph that does what `nodes` do, regions and views, of which each is the only reader of the one before it.

    Returns it with the values that its placeholders stand for; `graph_module` stays as it is.
    """
    inner = fx.Graph()
    owner = torch.nn.Module()
    known: dict[fx.Node, fx.Node] = {}  # outer value → node of the new graph
    outer = list(dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value not in nodes))
    for value in outer:
        known[value] = inner.placeholder(value.name)
        known[value].meta = _inherited(value.meta)
    for node in nodes:
        if not is_region(node):
            known[node] = inner.node_copy(node, known.__getitem__)
            continue
        graph = submodule(graph_module, node)
        copies = {own: known[value] for own, value in zip(placeholders(graph), inputs(node), strict=True)}
        for own in graph.graph.nodes:
            if own.op == "get_attr":
                setattr(owner, str(own.target), getattr(graph, str(own.target)))
            if own.op in ("get_attr", "call_function"):
                copies[own] = inner.node_copy(own, copies.__getitem__)
        known[node] = copies[result(graph)]
    inner.output(known[nodes[-1]])
    return fx.GraphModule(owner, inner), outer


def _inherited(meta: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in meta.items() if key == "val"}


def _install(
    graph_module: fx.GraphModule,
    region: fx.GraphModule,
    nodes: Sequence[fx.Node],
    outer: Sequence[fx.Node],
    name: str,
    region_info: RegionInfo,
    pass_name: str,
) -> fx.Node:
    graph_module.add_submodule(name, region)
    last = nodes[-1]
    with graph_module.graph.inserting_after(last):
        call = graph_module.graph.call_module(name, tuple(outer))
    call.meta.update(val=last.meta["val"], sepc_region=region_info, sepc_origin=derive(pass_name, nodes))
    last.replace_all_uses_with(call)
    for node in reversed(nodes):
        graph_module.graph.erase_node(node)
    return call
