"""How many bytes of the arena are in use while a region runs, before layouts are planned: what `fuse` keeps small.

A value lives from the region that writes it to the last reader of it or of a view of it. What is counted is the
tensors' own sizes; copies, gaps and where storages are placed are known later only (`sepc.passes.plan_memory`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sepc.ir import region
from sepc.ir.views import is_view


@dataclass(frozen=True)
class LiveBytes:
    """The lives of a graph's intermediate values.

    Attributes:
        position: place of each node in the order of execution.
        sizes: bytes of each value in the arena.
        readers: its readers, also of views of it.
    """

    position: Mapping[fx.Node, int]
    sizes: Mapping[fx.Node, int]
    readers: Mapping[fx.Node, frozenset[fx.Node]]

    @staticmethod
    def of(graph_module: fx.GraphModule) -> LiveBytes:
        """The lives of the values of `graph_module`; inputs, constants and results are not in the arena."""
        position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        readers = {node: frozenset(_readers(node)) for node in position if region.is_region(node)}
        in_arena = {node: found for node, found in readers.items() if all(one.op != "output" for one in found)}
        return LiveBytes(position, {node: _size_bytes(node) for node in in_arena}, in_arena)

    def during(self, nodes: Sequence[fx.Node]) -> int:
        """Bytes in use while the regions `nodes` run as one kernel, which stands where the last of them stood."""
        here, inside = self.position[nodes[-1]], nodes[:-1]
        return sum(
            size
            for node, size in self.sizes.items()
            if node not in inside and self.position[node] <= here and self._is_read_from(node, here, nodes)
        )

    def _is_read_from(self, node: fx.Node, here: int, nodes: Sequence[fx.Node]) -> bool:
        """Whether `node` is the last of `nodes`, or is read by one of them or later."""
        return node is nodes[-1] or any(
            reader in nodes or self.position[reader] >= here for reader in self.readers[node]
        )


def _readers(node: fx.Node) -> list[fx.Node]:
    found = list(node.users)
    for user in node.users:
        if is_view(user) or user.target is operator.getitem:
            found += _readers(user)
    return found


def _size_bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    tensors = [value] if isinstance(value, torch.Tensor) else value
    return sum(one.numel() * one.dtype.itemsize for one in tensors if isinstance(one, torch.Tensor))
