"""plan-memory: one arena for all intermediate values, with storage reused as soon as nobody needs it.

Pattern. The storages of a graph with layouts: one per region, per graph input, per constant that is read at top level.
A view has no storage; it prolongs the life of its base.

Equation. Two storages may overlap in the arena if their lifetimes [first write, last read], counted in nodes, do not.
Storages are placed largest first, each at the lowest offset where it overlaps no placed one that lives at the same time
(greedy by size, Pisarchyk & Lee 2020, 'Efficient Memory Management for Deep Neural Net Inference'); offsets are
multiples of 64 bytes. Scratch of a kernel may lie anywhere behind the storages in use while it runs.

Preconditions. Results of the graph, and storages they are views of, are not in the arena: the caller owns them. The
plan changes no node; it is what the runtime and the reports read.

    a = region_0(x);  b = region_1(a);  c = region_2(b);  return c      →      a @ 0,  b @ |a|,  c: result 0
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sepc.ir import ops
from sepc.ir.layout import layout, storage_elements
from sepc.ir.region import is_region
from sepc.passes.manager import PassContext

ALIGNMENT_BYTES = 64
# Left free after each storage, so that a kernel's input and output rarely lie at the same offset within a page: a load
# is held up by an earlier store to an address with equal low bits. Measured on a Zen 5 core, depthwise 56²×128: 78 µs
# without, 60 with.
GAP_BYTES = 192


@dataclass(frozen=True)
class MemoryPlan:
    """Where every storage lies.

    Attributes:
        arena_offsets: bytes from the start of the arena, by the node that owns the storage.
        arena_bytes: size of the arena.
        results: nodes whose storage the caller gets, in order of first appearance among the results.
        unshared_bytes: what the arena would take if no storage were reused.
        in_use_bytes: for each region, where the storages end that are in use while it runs: its scratch may follow.
        lifetimes: first write and last use of every storage in the arena, counted in nodes, by the node that owns it.
    """

    arena_offsets: Mapping[fx.Node, int]
    arena_bytes: int
    results: tuple[fx.Node, ...]
    unshared_bytes: int
    in_use_bytes: Mapping[fx.Node, int]
    lifetimes: Mapping[fx.Node, tuple[int, int]]


@dataclass(frozen=True)
class PlanMemory:
    """Computes the `MemoryPlan` of a graph and keeps it in ``graph_module.meta["sepc_memory"]``."""

    name: ClassVar[str] = "plan-memory"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Plan the memory of `graph_module`, whose nodes stay as they are."""
        plan = plan_memory(graph_module)
        graph_module.meta["sepc_memory"] = plan
        saved = f"arena of {plan.arena_bytes} bytes instead of {plan.unshared_bytes}"
        context.note(self.name, graph_module.graph.output_node(), saved, taken=True)
        return False


@dataclass(frozen=True)
class _Storage:
    owner: fx.Node
    size_bytes: int
    begin: int
    end: int


def plan_memory(graph_module: fx.GraphModule) -> MemoryPlan:
    """The memory plan of a graph whose values have layouts."""
    nodes = list(graph_module.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    results = _result_owners(graph_module.graph.output_node())
    first_write: dict[fx.Node, int] = {}
    last_use: dict[fx.Node, int] = {}
    for node in nodes:
        if "sepc_layout" in node.meta:
            base = layout(node).base
            uses = [position[user] for user in node.users]
            # Parts of a concatenation are written before the node that owns their storage; several results of a region
            # when it runs.
            written = node.all_input_nodes[0] if node.target is operator.getitem else node
            first_write.setdefault(base, position[written])
            last_use[base] = max([last_use.get(base, position[node]), *uses])
    storages = [
        _Storage(node, storage_bytes(node), first_write[node], last_use[node])
        for node in nodes
        if owns_storage(node) and node not in results
    ]
    offsets = _place(storages)
    ends = [(s.begin, s.end, offsets[s.owner] + s.size_bytes) for s in storages]
    in_use = {
        node: max((end for first, last, end in ends if first <= position[node] <= last), default=0)
        for node in nodes
        if is_region(node)
    }
    total = max((end for _, _, end in ends), default=0)
    lifetimes = {storage.owner: (storage.begin, storage.end) for storage in storages}
    return MemoryPlan(offsets, total, results, sum(s.size_bytes for s in storages), in_use, lifetimes)


def owns_storage(node: fx.Node) -> bool:
    """Whether `node` writes a storage of its own: a region, or one result of a region with several."""
    if "sepc_layout" not in node.meta or layout(node).base is not node:
        return False
    return is_region(node) or node.op == "call_function"


def storage_bytes(node: fx.Node) -> int:
    """Bytes of the storage that `node` owns, rounded up to the alignment, and the gap after it."""
    elements = storage_elements(ops.shape(node), layout(node).strides)
    size = elements * ops.dtype(node).itemsize
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + GAP_BYTES


def _result_owners(output: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose storages the graph's results lie in, without inputs and constants."""
    owners: dict[fx.Node, None] = {}
    for value in output.all_input_nodes:
        if isinstance(value.meta["val"], torch.Tensor) and owns_storage(layout(value).base):
            owners[layout(value).base] = None
    return tuple(owners)


def _place(storages: list[_Storage]) -> dict[fx.Node, int]:
    """Offsets of `storages`: largest first, each as low as its living neighbours allow."""
    placed: list[tuple[int, _Storage]] = []
    for storage in sorted(storages, key=lambda s: (-s.size_bytes, s.begin)):
        offset = 0
        for start, other in sorted(placed, key=lambda item: item[0]):
            if other.end < storage.begin or storage.end < other.begin:
                continue
            if start - offset >= storage.size_bytes:
                break
            offset = max(offset, start + other.size_bytes)
        placed.append((offset, storage))
    return {storage.owner: offset for offset, storage in placed}
