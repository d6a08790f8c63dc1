"""Two networks side by side: one as it was, one in which layers are replaced as one goes, on all batches at once.

Nodes of the graph are computed when they are asked for, for all batches, and kept until all of their users are, so that
every layer of both runs once. Where nothing before a node was replaced, both have the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from sepc.errors import VerificationError

Values = list[Any]
"""Of one node: one for each batch."""


class Twins:
    """The values of both networks.

    Args:
        graph_module: a captured graph with one input.
        batches: values of that input, each of the shape that was captured.
    """

    def __init__(self, graph_module: fx.GraphModule, batches: Sequence[torch.Tensor]) -> None:
        self._graph_module, self._batches = graph_module, batches
        self._replaced: dict[fx.Node, nn.Module] = {}
        # Nodes that the second network computes for itself, and all values there are, of both.
        self._apart: set[fx.Node] = set()
        self._first: dict[fx.Node, Values] = {}
        self._second: dict[fx.Node, Values] = {}
        self._first_done: set[fx.Node] = set()
        self._second_done: set[fx.Node] = set()

    def first(self, node: fx.Node) -> Values:
        """The values of `node` in the first network, as it was."""
        return self._computed(node, self._first, self._first_done, lambda _: True, self._run)

    def second(self, node: fx.Node) -> Values:
        """The values of `node` in the second network, in which layers are replaced."""
        if node not in self._apart:
            return self.first(node)
        return self._computed(node, self._second, self._second_done, self._apart.__contains__, self._run_second)

    def replace(self, node: fx.Node, layer: nn.Module) -> None:
        """From now on the second network has `layer` in the place of the convolution `node`."""
        self._replaced[node] = layer
        changed = [node]
        while changed:
            one = changed.pop()
            self._second.pop(one, None)
            self._second_done.discard(one)
            self._apart.add(one)
            changed += [user for user in one.users if user not in self._apart or user in self._second_done]

    def forget(self) -> None:
        """Drop all values whose users are all computed; one that is asked for again is computed again."""
        for node in list(self._first):
            if all(
                user in self._first_done and (user not in self._apart or user in self._second_done)
                for user in node.users
            ):
                del self._first[node]
        for node in list(self._second):
            if self._second_done.issuperset(node.users):
                del self._second[node]

    @torch.no_grad()
    def _computed(
        self,
        node: fx.Node,
        values: dict[fx.Node, Values],
        done: set[fx.Node],
        is_own: Callable[[fx.Node], bool],
        run: Callable[[fx.Node], Values],
    ) -> Values:
        """The values of `node`, after those of all nodes that it needs; not recursive, as graphs are deep."""
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
        return values[node]

    def _run(self, node: fx.Node) -> Values:
        if node.op == "placeholder":
            return list(self._batches)
        if node.op == "get_attr":
            return [getattr(self._graph_module, str(node.target))] * len(self._batches)
        return self._call(node, {one: self._first[one] for one in node.all_input_nodes})

    def _run_second(self, node: fx.Node) -> Values:
        layer = self._replaced.get(node)
        if layer is not None:
            return [layer(values) for values in self.second(node.all_input_nodes[0])]
        return self._call(node, {one: self.second(one) for one in node.all_input_nodes})

    def _call(self, node: fx.Node, inputs: dict[fx.Node, Values]) -> Values:
        if not callable(node.target):
            raise VerificationError("A node of a captured graph is no operator", where=node.name)
        results: Values = []
        for batch in range(len(self._batches)):
            args, kwargs = _at(batch, (node.args, node.kwargs), inputs)
            results.append(node.target(*args, **kwargs))
        return results


def _at(batch: int, arguments: Any, inputs: dict[fx.Node, Values]) -> Any:
    return fx.map_arg(arguments, lambda one: inputs[one][batch])
