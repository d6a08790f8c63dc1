"""What makes large graphs readable: stages that repeat are drawn once, and lines that would go all over are left out.

A stage is a stretch of the graph that follows on itself, as the blocks of a network do. It repeats where its operators,
types and inputs are the same, inputs by how far back they are. The one that leaves the most nodes out is folded first,
then those before and after it. Regions stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from sepc.report.snapshot import DrawnNode, Snapshot

LEAST_NODES: Final = 100
"""Graphs of fewer nodes are drawn whole."""
MOST_LENGTH: Final = 6_000
"""Of all lines of a graph together, in nodes that they pass: more take Graphviz minutes, and nobody can follow them."""
LONG: Final = 30
"""Lines that pass so many nodes are left out of a graph that has too many."""


@dataclass(frozen=True)
class Repeat:
    """A stretch that is drawn once: the keys of its nodes and the names of its regions, and how often it comes.

    `predicted_us` is the time of all of them.
    """

    members: tuple[str, ...]
    times: int
    predicted_us: float


def fold(snapshot: Snapshot) -> tuple[Snapshot, tuple[Repeat, ...]]:
    """`snapshot` with repeated stretches drawn once, and what these are."""
    units = [tuple(members) for _, members in groupby(snapshot.nodes, key=lambda node: node.region or node.key)]
    signatures = _signatures(snapshot, units)
    stand_in: dict[str, str] = {}
    repeats: list[Repeat] = []
    for start, period, times in _repetitions(signatures, 0, len(signatures)):
        first = [node for unit in units[start : start + period] for node in unit]
        every = [node for unit in units[start : start + period * times] for node in unit]
        for index, node in enumerate(every[len(first) :]):
            stand_in[node.key] = first[index % len(first)].key
        regions = {node.region for node in every if node.region}
        time_us = sum(snapshot.regions[name].predicted_us for name in regions)
        members = (*(node.key for node in first), *dict.fromkeys(node.region for node in first if node.region))
        repeats.append(Repeat(members, times, time_us))
    kept = [node for node in snapshot.nodes if node.key not in stand_in]
    nodes = tuple(
        replace(node, inputs=tuple(dict.fromkeys(stand_in.get(key, key) for key in node.inputs))) for node in kept
    )
    regions_left = {node.region for node in kept}
    shown = {name: one for name, one in snapshot.regions.items() if name in regions_left}
    return replace(snapshot, nodes=nodes, regions=shown), tuple(repeats)


def _signatures(snapshot: Snapshot, units: Sequence[tuple[DrawnNode, ...]]) -> list[object]:
    """What must be equal of units that are drawn once."""
    position = {node.key: index for index, node in enumerate(snapshot.nodes)}
    return [
        tuple(
            (
                *(node.role, node.type, node.constants),
                node.title if node.role in ("operator", "view") else node.key,
                snapshot.regions[node.region].kind if node.region else "",
                tuple(position[node.key] - position[key] for key in node.inputs),
            )
            for node in unit
        )
        for unit in units
    ]


def _repetitions(signatures: Sequence[object], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(start, period, times) of what repeats within a stretch of units, without overlaps, in order."""
    best = (0, 0, 0, 0)
    for period in range(1, (end - begin) // 2 + 1):
        equal = 0  # Units from here on that are as those a period later.
        for start in range(end - period - 1, begin - 1, -1):
            equal = equal + 1 if signatures[start] == signatures[start + period] else 0
            times = equal // period + 1
            best = max(best, (period * (times - 1), -period, -start, times))
    saved, period, start, times = best[0], -best[1], -best[2], best[3]
    if saved < 2:  # One unit less is not worth a frame.
        return
    yield from _repetitions(signatures, begin, start)
    yield start, period, times
    yield from _repetitions(signatures, start + period * times, end)


def shorten(snapshot: Snapshot) -> Snapshot:
    """`snapshot` without its long lines, if they are too many, as those of a DenseNet; nodes say how many they lack."""
    position = {node.key: index for index, node in enumerate(snapshot.nodes)}
    lengths = [position[node.key] - position[key] for node in snapshot.nodes for key in node.inputs]
    if sum(lengths) <= MOST_LENGTH:
        return snapshot
    nodes: list[DrawnNode] = []
    for node in snapshot.nodes:
        near = [key for key in node.inputs if position[node.key] - position[key] < LONG]
        # One line at least shows where a node belongs.
        kept = tuple(near or node.inputs[-1:])
        nodes.append(replace(node, inputs=kept, far=tuple(key for key in node.inputs if key not in kept)))
    return replace(snapshot, nodes=tuple(nodes))
