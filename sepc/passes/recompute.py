"""recompute: compute a value once for each of its readers where that is predicted cheaper than storing it.

Pattern. A region r over images with readers s₁ … sₖ, k ≥ 2, some of which could be one chain with it.

Equation. Reader i costs alone(i) if r is stored, and chain(i), a chain of r and sᵢ, if it computes r itself. With
F = {i : chain(i) < alone(i)} the readers that gain in any case,

    cost = min( time(r) + Σ_{i ∈ F} chain(i) + Σ_{i ∉ F} alone(i),    r still being stored for the others
                Σᵢ chain(i) )                                        r not being stored at all, if all readers can.

Preconditions. No region is read by r alone: it might be one chain with r, which copies of r would prevent. The chains
themselves are made by `fuse`, which comes next and decides by the same times.

    %r = region_0_elementwise(%x)            relu            %r = region_0_elementwise(%x)
    %a = region_1_convolution(%r)            depthwise   →   %a = region_1_convolution(%r)
    %b = region_2_convolution(%r)            pointwise       %r_1 = region_0_…_recompute_0(%x)
                                                             %b = region_2_convolution(%r_1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from sepc.cost_model.planner import Planner
from sepc.ir import region
from sepc.ir.origin import derive
from sepc.passes.manager import PassContext
from sepc.passes.sequences import RegionSequence, following_link, piece_time_us, starts_a_sequence


@dataclass(frozen=True)
class Recompute:
    """Gives readers of a cheap value copies of the region that computes it."""

    name: ClassVar[str] = "recompute"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module`; returns whether anything is computed several times now."""
        planner = context.planner_for(self.name)
        changed = False
        for node, _ in list(region.regions(graph_module)):
            if len(node.users) < 2 or not starts_a_sequence(graph_module, node) or _ends_a_sequence(node):
                continue
            for number, user in enumerate(_choose(graph_module, node, planner, context)):
                self._give_copy(graph_module, node, user, number)
                changed = True
        return changed

    def _give_copy(self, graph_module: fx.GraphModule, node: fx.Node, user: fx.Node, number: int) -> None:
        """Have `user` read a copy of `node`, whose graph is its own, as later passes may change one of them."""
        graph, inputs = region.join(graph_module, [node])
        name = f"{node.target}_{self.name}_{number}"
        graph_module.add_submodule(name, graph)
        with graph_module.graph.inserting_before(user):
            copy = graph_module.graph.call_module(name, tuple(inputs))
        copy.meta.update(node.meta)
        copy.meta["sepc_origin"] = derive(self.name, [node])
        user.replace_input_with(node, copy)


@dataclass(frozen=True)
class _Reader:
    """A user of the region's value; predicted times of that, of the region it leads to, and of both as a chain."""

    user: fx.Node
    value_us: float
    alone_us: float
    chain_us: float


def _ends_a_sequence(node: fx.Node) -> bool:
    return any(region.is_region(value) and len(value.users) == 1 for value in node.all_input_nodes)


def _choose(graph_module: fx.GraphModule, node: fx.Node, planner: Planner, context: PassContext) -> Sequence[fx.Node]:
    """The users of `node` that are to have a copy of their own; where that is all, the last one keeps the original."""
    readers = [_reader(graph_module, node, user, planner) for user in node.users]
    able = [reader for reader in readers if reader is not None]
    if not able:
        return []
    gaining = [reader for reader in able if reader.chain_us < reader.alone_us]
    # Of equally quick ways the first one is taken.
    best = min(([], gaining, able), key=lambda copied: _time_us(copied, able, len(readers)))
    for copied in [able, gaining] if len(gaining) < len(able) else [able]:
        if copied:
            _note(node, copied, best, able, len(readers), context)
    return [reader.user for reader in (best[:-1] if len(best) == len(readers) else best)]


def _time_us(copied: Sequence[_Reader], able: Sequence[_Reader], readers: int) -> float:
    """Predicted time of the region and of those `able` to be one chain with it, if it is computed for `copied`."""
    times_us = [reader.chain_us if reader in copied else reader.alone_us for reader in able]
    return sum(times_us) + (able[0].value_us if len(copied) < readers else 0.0)


def _note(
    node: fx.Node,
    copied: Sequence[_Reader],
    best: Sequence[_Reader],
    able: Sequence[_Reader],
    readers: int,
    context: PassContext,
) -> None:
    """Record whether the region is computed for each of `copied`, which it is if they are the `best` ones."""
    times_us = _time_us([], able, readers), _time_us(copied, able, readers)
    message = f"computed for {len(copied)} of {readers} readers"
    if copied != best:
        message = f"not {message}: {'no gain' if times_us[1] >= times_us[0] else 'other ways gain more'}"
    about = [node, *(reader.user for reader in copied)]
    context.note(Recompute.name, about, message, taken=copied == best, times_us=times_us)


def _reader(graph_module: fx.GraphModule, node: fx.Node, user: fx.Node, planner: Planner) -> _Reader | None:
    """The reader that `user` leads to; None if it could not be the next link after `node`."""
    found = following_link(graph_module, node, user)
    if found is None:
        return None
    reader, views = found
    links = RegionSequence.of(graph_module, [node, reader], [[], views]).links
    times_us = [piece_time_us(one, planner) for one in (links[:1], links[1:], links)]
    known_us = [one for one in times_us if one is not None]
    return _Reader(user, *known_us) if len(known_us) == len(times_us) else None
