"""Two networks side by side: one as it was, one in which layers are replaced as one goes, on batch after batch.

Nodes of the graph are computed when they are asked for, and kept until all of their users are, so that every layer of
both runs once for a batch. Where nothing before a node was replaced, both have the same values.

Between two layers the values of all batches would be kept. Those of images of many pixels may be too large for that:
beyond a limit the values of a batch are dropped, and computed anew for the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import fx, nn

from sepc.errors import VerificationError

KEPT_BYTES: Final = 2 << 30

Values = dict[fx.Node, Any]


class Pair:
    """The values of both networks for one batch.

    Args:
        graph_module: a captured graph.
        inputs: values of its inputs, of the shapes that were captured.
        replaced: what the second network has in the place of nodes.
        apart: nodes that the second network computes for itself.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[torch.Tensor],
        replaced: dict[fx.Node, nn.Module],
        apart: set[fx.Node],
    ) -> None:
        placeholders = (node for node in graph_module.graph.nodes if node.op == "placeholder")
        self._graph_module, self._inputs = graph_module, dict(zip(placeholders, inputs, strict=True))
        self._replaced, self._apart = replaced, apart
        self._first: Values = {}
        self._second: Values = {}
        self._first_done: set[fx.Node] = set()
        self._second_done: set[fx.Node] = set()

    def first(self, node: fx.Node) -> Any:
        """The value of `node` in the first network, as it was."""
        return self._computed(node, self._first, self._first_done, lambda _: True, self._run)

    def second(self, node: fx.Node) -> Any:
        """The value of `node` in the second network, in which layers are replaced."""
        if node not in self._apart:
            return self.first(node)
        return self._computed(node, self._second, self._second_done, self._apart.__contains__, self._run_second)

    def outdate(self, nodes: set[fx.Node]) -> None:
        """Drop what the second network has of `nodes`."""
        self._second_done -= nodes
        for node in nodes & self._second.keys():
            del self._second[node]

    def forget(self, nodes: Sequence[fx.Node] | None = None) -> None:
        """Drop the values of `nodes`, or of all, whose users are all computed; at need they are computed again."""
        for node in list(self._first) if nodes is None else nodes:
            if all(
                user in self._first_done and (user not in self._apart or user in self._second_done)
                for user in node.users
            ):
                self._first.pop(node, None)
        for node in list(self._second) if nodes is None else nodes:
            if self._second_done.issuperset(node.users):
                self._second.pop(node, None)

    def drop(self) -> None:
        """Drop all values."""
        for one in (self._first, self._second, self._first_done, self._second_done):
            one.clear()

    def kept_bytes(self) -> int:
        """Of the values that there are; parameters and inputs are there in any case."""
        values = [value for one in (self._first, self._second) for node, value in one.items() if node.op[0] == "c"]
        tensors = (one for value in values for one in torch.utils._pytree.tree_leaves(value))
        storages = (one.untyped_storage() for one in tensors if isinstance(one, torch.Tensor))
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    @torch.no_grad()
    def _computed(
        self,
        node: fx.Node,
        values: Values,
        done: set[fx.Node],
        is_own: Callable[[fx.Node], bool],
        run: Callable[[fx.Node], Any],
    ) -> Any:
        """The value of `node`, after those of all nodes that it needs; not recursive, as graphs are deep."""
        pending = [node]
        while pending:
            missing = [one for one in pending[-1].all_input_nodes if is_own(one) and one not in values]
            if pending[-1] in values:
                pending.pop()
            elif missing:
                pending += missing
            else:
                values[pending[-1]] = run(pending[-1])
                done.add(pending[-1])
                self.forget(pending[-1].all_input_nodes)
        return values[node]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._inputs[node]
        if node.op == "get_attr":
            return getattr(self._graph_module, str(node.target))
        return _call(node, {one: self._first[one] for one in node.all_input_nodes})

    def _run_second(self, node: fx.Node) -> Any:
        layer = self._replaced.get(node)
        if layer is not None:
            return layer(self.second(node.all_input_nodes[0]))
        return _call(node, {one: self.second(one) for one in node.all_input_nodes})


class Twins:
    """Both networks, for all batches in turn.

    Args:
        graph_module: a captured graph.
        batches: arguments of it, each of the shapes that were captured.
        kept_bytes: of values that are kept from one turn to the next, but for the batch at hand.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        batches: Sequence[Sequence[torch.Tensor]],
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._replaced: dict[fx.Node, nn.Module] = {}
        self._apart: set[fx.Node] = set()
        self._kept_bytes = kept_bytes
        self._pairs = [Pair(graph_module, inputs, self._replaced, self._apart) for inputs in batches]
        self.images = sum(len(inputs[0]) for inputs in batches)

    def __iter__(self) -> Iterator[Pair]:
        """The pairs in turn; when the next one's turn comes, what is not needed any more of one is dropped."""
        left = self._kept_bytes
        for pair in self._pairs:
            yield pair
            pair.forget()
            bytes_of_pair = pair.kept_bytes()
            if bytes_of_pair > left:
                pair.drop()
            else:
                left -= bytes_of_pair

    def differ_at(self, node: fx.Node) -> bool:
        """Whether the second network computes `node` for itself, as something before it was replaced."""
        return node in self._apart

    def replace(self, node: fx.Node, layer: nn.Module) -> None:
        """From now on the second network has `layer` in the place of `node`."""
        self._replaced[node] = layer
        changed, pending = {node}, [node]
        while pending:
            users = [user for user in pending.pop().users if user not in changed]
            changed.update(users)
            pending += users
        self._apart |= changed
        for pair in self._pairs:
            pair.outdate(changed)


def _call(node: fx.Node, inputs: Values) -> Any:
    if not callable(node.target):
        raise VerificationError("A node of a captured graph is no operator", where=node.name)
    args, kwargs = fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
    return node.target(*args, **kwargs)
