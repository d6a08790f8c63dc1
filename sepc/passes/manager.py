"""The pass manager, and the pieces that passes are made of: notes, rules and the rewriter.

A pass only rewrites. The manager alone cleans up after it (dead code, unused constants), recompiles, propagates shapes,
lints, verifies structure and, if asked, numerics, times and dumps.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from sepc.errors import VerificationError
from sepc.ir.element import FLOAT32, Element
from sepc.ir.origin import derive, origin_of
from sepc.ir.printer import describe_type
from sepc.ir.verify import verify, verify_numerics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch._ops import OpOverload
    from torch.fx.node import Argument

    from sepc.cost_model.machine import Machine


class Target(Protocol):
    """What passes may know of a compilation target."""

    @property
    def name(self) -> str:
        """The target's name, such as ``x86-64-v4``."""


@dataclass(frozen=True)
class Note:
    """A decision of a pass about nodes: what it did, or what it did not do, and why.

    Attributes:
        pass_name: the pass. nodes: names of the nodes. source: the user's line that they come from, as ``file:line``.
        message: what was done, or the reason why it was not.
        taken: whether it was done.
        before_us, after_us: predicted times without and with it; None where prediction does not decide.
    """

    pass_name: str
    nodes: tuple[str, ...]
    message: str
    taken: bool = False
    before_us: float | None = None
    after_us: float | None = None
    source: str = ""

    @property
    def gain_us(self) -> float | None:
        """The predicted time that it saves, or would."""
        return None if self.before_us is None or self.after_us is None else self.before_us - self.after_us


@dataclass
class PassContext:
    """What passes share besides the graph.

    Attributes:
        target, machine: for whom the graph is compiled; None where no pass needs to know.
        threads: how many threads run the kernels. element: the type in which stages compute what is float32.
        example_inputs: tensors for the placeholders, for numeric verification; None: random ones of the right types.
        notes: the passes' decisions, in order.
    """

    target: Target | None = None
    machine: Machine | None = None
    threads: int = 1
    element: Element = FLOAT32
    example_inputs: tuple[torch.Tensor, ...] | None = None
    notes: list[Note] = field(default_factory=list)
    _known: set[Note] = field(default_factory=set, repr=False)

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        """The types that stages of ours compute with."""
        return tuple(getattr(torch, one.name) for one in dict.fromkeys((FLOAT32, self.element)))

    def machine_for(self, pass_name: str) -> Machine:
        """The machine, for the pass of that name; raises VerificationError if none is set."""
        if self.machine is None:
            raise VerificationError(f"{pass_name} needs a machine", fix="set PassContext.machine")
        return self.machine

    def note(
        self,
        pass_name: str,
        about: fx.Node | Sequence[fx.Node],
        message: str,
        *,
        taken: bool = False,
        times_us: tuple[float, float] | None = None,
    ) -> None:
        """Record a decision about a node or several, once; `times_us` are those before and after."""
        nodes = (about,) if isinstance(about, fx.Node) else tuple(about)
        source = next((origin.source for origin in map(origin_of, nodes) if origin.source), "")
        before_us, after_us = times_us or (None, None)
        note = Note(pass_name, tuple(node.name for node in nodes), message, taken, before_us, after_us, source)
        if note not in self._known:
            self._known.add(note)
            self.notes.append(note)


class Pass(Protocol):
    """A frozen dataclass: a name, options as fields, and one method."""

    name: ClassVar[str]

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module`; returns whether it changed."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: in `time_ms` by itself, with a `max_difference` by numeric verification (None: not run)."""

    name: str
    changed: bool
    time_ms: float
    nodes_before: int
    nodes_after: int
    notes: tuple[Note, ...]
    max_difference: float | None = None


class Observer:
    """Somebody who looks on while passes run; what is here does nothing."""

    def start(self, graph_module: fx.GraphModule) -> None:
        """Called with the graph as it is before the first pass."""

    def before(self, one: Pass, graph_module: fx.GraphModule) -> None:
        """Called before pass `one` runs."""

    def after(self, index: int, one: Pass, graph_module: fx.GraphModule, changed: bool) -> None:
        """Called after pass `one`, number `index` counted from 1, has run and its result was found sound."""

    def failed(self, one: Pass, error: Exception) -> None:
        """Called where pass `one` raised `error`, or left a graph that is not sound; the error is raised afterwards."""


@dataclass(frozen=True)
class PassManager:
    """Runs `passes` in order.

    Attributes:
        passes: the pipeline.
        verify_each: run the graph before and after each pass on the same input, and compare.
        observers: who looks on.
    """

    passes: Sequence[Pass]
    verify_each: bool = False
    observers: Sequence[Observer] = ()

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> list[PassRecord]:
        """Run all passes on `graph_module`; raises VerificationError if one breaks the graph or changes its meaning."""
        for observer in self.observers:
            observer.start(graph_module)
        inputs = verification_inputs(graph_module, context.example_inputs) if self.verify_each else ()
        outputs = _execute(graph_module, inputs) if self.verify_each else ()
        tolerance = tolerance_of(graph_module)
        records: list[PassRecord] = []
        for index, one in enumerate(self.passes, start=1):
            for observer in self.observers:
                observer.before(one, graph_module)
            size, first_note, started = len(graph_module.graph.nodes), len(context.notes), time.perf_counter()
            with self._watched(one):
                changed = one.run(graph_module, context)
                time_ms = (time.perf_counter() - started) * 1e3
                difference = None
                if changed:
                    finish(graph_module, one.name)
                    if self.verify_each:
                        tolerance = max(tolerance, tolerance_of(graph_module))  # Types may have become coarser.
                        reference, outputs = outputs, _execute(graph_module, inputs)
                        difference = verify_numerics(one.name, reference, outputs, tolerance)
            for observer in self.observers:
                observer.after(index, one, graph_module, changed)
            notes, nodes = tuple(context.notes[first_note:]), len(graph_module.graph.nodes)
            records.append(PassRecord(one.name, changed, time_ms, size, nodes, notes, difference))
        return records

    @contextmanager
    def _watched(self, one: Pass) -> Iterator[None]:
        """Tell the observers of an error within."""
        try:
            yield
        except Exception as error:
            for observer in self.observers:
                observer.failed(one, error)
            raise


def tolerance_of(graph_module: fx.GraphModule) -> float:
    """How far results of `graph_module` may differ, relative to the largest, by the coarsest type in it."""
    values = (value for node in graph_module.graph.nodes for value in pytree.tree_leaves(node.meta.get("val")))
    types = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    # Rounding errors of halves add up from layer to layer: this catches mistakes, not errors of rounding.
    return max([16 * torch.finfo(one).eps for one in types & {torch.float16, torch.bfloat16}], default=1e-4)


def finish(graph_module: fx.GraphModule, pass_name: str) -> None:
    """Bring a rewritten graph back in order: no dead code, right types, origins, code; raises VerificationError."""
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"{pass_name} left a malformed graph", why=str(error).partition("\n")[0]) from error
    graph_module.graph.eliminate_dead_code()
    drop_unused_constants(graph_module)
    graph_module.delete_all_unused_submodules()
    propagate_types(graph_module)
    for node in graph_module.graph.nodes:
        node.meta.setdefault("sepc_origin", derive(pass_name, node.all_input_nodes))
    verify(graph_module)
    graph_module.recompile()


def drop_unused_constants(graph_module: fx.GraphModule) -> None:
    """Remove parameters and buffers that no node reads, in `graph_module` and its regions."""
    used = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name in [*dict(graph_module.named_parameters(recurse=False)), *dict(graph_module.named_buffers(recurse=False))]:
        if name not in used:
            delattr(graph_module, name)
    for child in graph_module.children():
        if isinstance(child, fx.GraphModule):
            drop_unused_constants(child)


def fake_mode(graph_module: fx.GraphModule) -> FakeTensorMode:
    """The FakeTensorMode of the graph's types; a new one for a graph without types."""
    values = (node.meta.get("val") for node in graph_module.graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None) or FakeTensorMode()


def propagate_types(graph_module: fx.GraphModule, mode: FakeTensorMode | None = None) -> None:
    """Compute ``meta["val"]`` of all nodes afresh from the placeholders' types and the constants, also inside regions.

    Raises VerificationError, naming the node, where an operator does not accept its inputs.
    """
    mode = mode or fake_mode(graph_module)
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_function"):
            node.meta["val"] = infer(graph_module, node, mode)
        elif node.op == "call_module":
            region = getattr(graph_module, str(node.target), None)
            if not isinstance(region, fx.GraphModule):
                continue  # `verify` reports it.
            for placeholder, value in zip(region.graph.find_nodes(op="placeholder"), node.args, strict=True):
                placeholder.meta["val"] = value.meta["val"] if isinstance(value, fx.Node) else value
            propagate_types(region, mode)
            node.meta["val"] = fx.map_arg(region.graph.output_node().args[0], lambda result: result.meta["val"])


def infer(graph_module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> object:
    """The type of a ``get_attr`` or ``call_function`` `node` whose inputs are typed; raises VerificationError."""
    try:
        if node.op == "get_attr":
            return mode.from_tensor(getattr(graph_module, str(node.target)), static_shapes=True)
        if not callable(node.target):
            raise TypeError(f"{node.target!r} cannot be called")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: value.meta["val"])
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VerificationError(
            "A node does not fit its inputs", where=f"{node.name} = {node.target}", why=why
        ) from error


def verification_inputs(
    graph_module: fx.GraphModule, given: Sequence[torch.Tensor] | None = None, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Inputs to run the graph on: `given`, or seeded random ones; with the shapes and strides of the placeholders."""
    generator = torch.Generator().manual_seed(seed)
    inputs: list[torch.Tensor] = []
    for index, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        declared = node.meta["val"]
        tensor = torch.empty_strided(declared.shape, declared.stride(), dtype=declared.dtype)
        if given is not None:
            values = given[index]
        elif declared.dtype.is_floating_point:
            values = torch.randn(declared.shape, generator=generator)
        else:  # Small enough for an index, and for a boolean.
            values = torch.randint(0, 2, declared.shape, generator=generator)
        inputs.append(tensor.copy_(values))
    return tuple(inputs)


def _execute(graph_module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        outputs = graph_module(*inputs)
    return tuple(outputs)


@dataclass(frozen=True)
class Rejection:
    """Why a rule does not apply; `near`: the node looks like its pattern, so the reason is worth a note."""

    reason: str
    near: bool = True


@dataclass
class Rewriter:
    """Builds typed nodes in front of `anchor`, the node to be replaced; remembers them, so that they can be undone."""

    graph_module: fx.GraphModule
    pass_name: str
    mode: FakeTensorMode
    anchor: fx.Node
    origins: tuple[fx.Node, ...]
    created: list[fx.Node] = field(default_factory=list)

    def call(self, target: OpOverload, *args: Argument, **kwargs: Argument) -> fx.Node:
        """A call of `target`; raises VerificationError if it does not accept its inputs."""
        with self.graph_module.graph.inserting_before(self.anchor):
            name = target._schema.name.rpartition(":")[2]
            return self._typed(self.graph_module.graph.create_node("call_function", target, args, dict(kwargs), name))

    def constant(self, hint: str, value: torch.Tensor) -> fx.Node:
        """A new constant of the module, named after `hint`."""
        name, count = hint, 0
        while hasattr(self.graph_module, name):
            count += 1
            name = f"{hint}_{count}"
        self.graph_module.register_buffer(name, value)
        with self.graph_module.graph.inserting_before(self.anchor):
            return self._typed(self.graph_module.graph.get_attr(name))

    @property
    def description(self) -> str:
        """What is built in place of what, by operators."""
        built = [_operator(node) for node in self.created if node.op == "call_function"]
        return f"{_operator(self.anchor)} → {', '.join(built) or ('constant' if self.created else 'its input')}"

    def undo(self) -> None:
        """Erase all nodes built so far."""
        for node in reversed(self.created):
            self.graph_module.graph.erase_node(node)
        self.created.clear()

    def _typed(self, node: fx.Node) -> fx.Node:
        self.created.append(node)
        node.meta["val"] = infer(self.graph_module, node, self.mode)
        node.meta["sepc_origin"] = derive(self.pass_name, self.origins)
        return node


def _operator(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


Match = TypeVar("Match")


class Rule(ABC, Generic[Match]):
    """The unit of rewriting: `match` finds out whether it applies, `rewrite` builds the replacement."""

    targets: tuple[object, ...]
    """What the nodes call that `match` wants to see."""

    @abstractmethod
    def match(self, node: fx.Node, module: fx.GraphModule) -> Match | Rejection | None:
        """What `rewrite` needs; a rejection with its reason; or None where `node` is not of the pattern at all."""

    @abstractmethod
    def rewrite(self, match: Match, build: Rewriter) -> fx.Node:
        """Build what replaces the node, and return it."""

    def apply(self, node: fx.Node, pass_name: str, module: fx.GraphModule, context: PassContext) -> bool:
        """Replace `node` if the rule matches, and note that, or the reason if not; returns whether it was replaced."""
        found = self.match(node, module)
        if found is None:
            return False
        if isinstance(found, Rejection):
            context.note(pass_name, node, found.reason)
            return False
        build = Rewriter(module, pass_name, fake_mode(module), node, (node,))
        rejection = replace(node, build, lambda: self.rewrite(found, build))
        context.note(pass_name, node, rejection.reason if rejection else build.description, taken=rejection is None)
        return rejection is None


def replace(node: fx.Node, build: Rewriter, rewrite: Callable[[], fx.Node]) -> Rejection | None:
    """Replace `node` by what `rewrite` builds; undone, with the reason, where that has another type or does not fit."""
    try:
        new = rewrite()
    except VerificationError as error:
        build.undo()
        return Rejection(error.why)
    before, after = node.meta["val"], new.meta["val"]
    if not same_type(before, after):
        build.undo()
        return Rejection(f"its type would change from {describe_type(before)} to {describe_type(after)}")
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return None


def same_type(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether shape, dtype and the strides that matter (of dimensions larger than 1) are equal."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    triples = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(size <= 1 or one == other for size, one, other in triples)
