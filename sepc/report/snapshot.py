"""A graph as plain values, as pictures and pages show it: operators, who reads whom, and the regions around them.

Regions are opened: their operators are connected with those outside. Constants are no nodes of their own; an operator
that reads some lists their shapes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import fx

from sepc.ir import region
from sepc.ir.origin import origin_of
from sepc.ir.views import is_view
from sepc.report.words import op_name, shape_text

if TYPE_CHECKING:
    from sepc.report.explanation import RegionExplanation

Role = Literal["input", "output", "constant", "operator", "view"]
Mark = Literal["new", "removed", "changed"]


@dataclass(frozen=True)
class DrawnNode:
    """One node of a picture.

    Attributes:
        key: names it within the picture. name: the node's name in its graph, by which graphs are compared.
        title: what it calls, or its name. role: what sort of node it is.
        type: shape of its result, and its type unless that is float32. constants: shapes of those that it reads.
        inputs: keys of the nodes that it reads. far: keys of more of them, to which no line is drawn.
        region: the region that it is in; empty for none.
        source: the user's line as ``file:line``. made_by: the pass that made it.
    """

    key: str
    name: str
    title: str
    role: Role
    type: str
    constants: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    region: str = ""
    source: str = ""
    made_by: str = ""
    far: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[str, str]:
        """What makes it the same node in two graphs."""
        return self.name, self.title

    @property
    def lines(self) -> tuple[str, ...]:
        """What a picture writes into it."""
        reads = f"by {', '.join(self.constants)}" if self.constants else ""
        more = f"and {len(self.far)} from above" if self.far else ""
        return tuple(line for line in (self.title, self.type, reads, more) if line)


@dataclass(frozen=True)
class DrawnRegion:
    """A region of a picture; figures are those of `RegionExplanation`, 0 or None where they are not known."""

    name: str
    kind: str = ""
    kernel: str = ""
    reason: str = ""
    tiling: str = ""
    predicted_us: float = 0.0
    measured_us: float | None = None
    bottleneck: str = ""
    bytes_moved: int = 0
    flops: int = 0

    @property
    def colour(self) -> str:
        """By what it is coloured: what bounds it, or who runs it where that is not known."""
        return self.bottleneck or (self.kernel if self.kernel in ("tvm", "torch") else "")


@dataclass(frozen=True)
class Snapshot:
    """A graph as it was at some time.

    Attributes:
        title: when. nodes: in execution order. regions: by name.
    """

    title: str
    nodes: tuple[DrawnNode, ...]
    regions: Mapping[str, DrawnRegion]

    @staticmethod
    def of(graph_module: fx.GraphModule, title: str = "") -> Snapshot:
        """The graph as it is now, with what it says of its regions itself."""
        return _Reader(graph_module).read(title)

    def with_figures(self, known: Iterable[RegionExplanation]) -> Snapshot:
        """The same with what is told of some of its regions."""
        regions = dict(self.regions)
        for one in known:
            if one.name in regions:
                regions[one.name] = replace(
                    regions[one.name],
                    kernel=one.kernel,
                    reason=one.reason,
                    measured_us=one.measured_us,
                    bytes_moved=one.bytes_moved,
                    flops=one.flops,
                )
        return replace(self, regions=regions)


def compare(before: Snapshot, after: Snapshot) -> tuple[dict[str, Mark], dict[str, Mark]]:
    """What the step from `before` to `after` did: marks by the keys of the nodes of each, and the names of regions."""
    left, right = _marks(before, after, "removed"), _marks(after, before, "new")
    known = {node.identity: (node.type, node.constants) for node in before.nodes}
    for node in after.nodes:
        if node.identity in known and known[node.identity] != (node.type, node.constants):
            right.setdefault(node.key, "changed")
    return left, right


def _marks(those: Snapshot, others: Snapshot, mark: Mark) -> dict[str, Mark]:
    """Which nodes and regions of `those` are not in `others`."""
    there = Counter(node.identity for node in others.nodes)
    marks: dict[str, Mark] = {name: mark for name in those.regions if name not in others.regions}
    for node in those.nodes:
        if there[node.identity]:
            there[node.identity] -= 1
        else:
            marks[node.key] = mark
    return marks


@dataclass
class _Reader:
    """Reads a graph node by node."""

    graph_module: fx.GraphModule
    nodes: list[DrawnNode] = field(default_factory=list)
    regions: dict[str, DrawnRegion] = field(default_factory=dict)
    # The keys of what stands for a value: of a region with two results, two.
    keys: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)

    def read(self, title: str) -> Snapshot:
        for node in self.graph_module.graph.nodes:
            body = getattr(self.graph_module, str(node.target), None) if node.op == "call_module" else None
            if isinstance(body, fx.GraphModule):
                self._open(node, body)
            elif node.target is operator.getitem and len(self.keys[node.all_input_nodes[0]]) > 1:
                self.keys[node] = (self.keys[node.all_input_nodes[0]][node.args[1]],)
            elif node.op != "get_attr" or any(user.op != "call_function" for user in node.users):
                self._draw(node)
        return Snapshot(title, tuple(self.nodes), self.regions)

    def _open(self, node: fx.Node, body: fx.GraphModule) -> None:
        for own, value in zip(region.placeholders(body), region.inputs(node), strict=True):
            self.keys[own] = self.keys[value]
        for inner in region.computations(body):
            self._draw(inner, node.name)
        self.keys[node] = tuple(self.keys[value][0] for value in region.returned(body))
        info, choice = node.meta.get("sepc_region"), node.meta.get("sepc_tiling")
        drawn = DrawnRegion(node.name, bytes_moved=region.bytes_moved(node, body))
        if isinstance(info, region.RegionInfo):
            drawn = replace(drawn, kind=info.kind, kernel=info.kernel, reason=info.reason)
        if choice is not None and drawn.kernel == "sepc":
            cost = choice.cost
            drawn = replace(drawn, tiling=str(choice.tiling), predicted_us=cost.time_us, bottleneck=cost.bottleneck)
            drawn = replace(drawn, flops=cost.flops)
        self.regions[node.name] = drawn

    def _draw(self, node: fx.Node, inside: str = "") -> None:
        key = f"{inside}/{node.name}" if inside else node.name
        self.keys[node] = (key,)
        read = [value for value in node.all_input_nodes if value in self.keys]
        constants = [value for value in node.all_input_nodes if value.op == "get_attr" and value not in self.keys]
        origin = origin_of(node)
        self.nodes.append(
            DrawnNode(
                key=key,
                name=node.name,
                title=op_name(node.target) if node.op == "call_function" else node.name,
                role=_role(node),
                type=shape_text(node.meta.get("val")),
                constants=tuple(shape_text(value.meta.get("val")) for value in constants),
                inputs=tuple(dict.fromkeys(self.keys[value][0] for value in read)),
                region=inside,
                source=origin.source,
                made_by=origin.pass_name,
            )
        )


def _role(node: fx.Node) -> Role:
    match node.op:
        case "placeholder":
            return "input"
        case "output":
            return "output"
        case "get_attr":
            return "constant"
        case _:
            return "view" if is_view(node) or node.target is operator.getitem else "operator"
