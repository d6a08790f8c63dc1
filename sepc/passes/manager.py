"""The pass manager, and what passes share: the context, and notes of what they decided.

A pass only rewrites. The manager alone cleans up after it (dead code, unused constants), recompiles, propagates shapes,
lints, verifies structure and, if asked, numerics, times and dumps.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sepc.errors import VerificationError
from sepc.ir.element import FLOAT32, Element
from sepc.ir.origin import derive, origin_of
from sepc.ir.types import propagate_types
from sepc.ir.verify import verify, verify_numerics
from sepc.progress import progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sepc.cost_model.planner import AnyMachine, Planner
    from sepc.passes.observers import Observer

logger = logging.getLogger(__name__)


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
    machine: AnyMachine | None = None
    threads: int = 1
    element: Element = FLOAT32
    example_inputs: tuple[torch.Tensor, ...] | None = None
    notes: list[Note] = field(default_factory=list)
    _known: set[Note] = field(default_factory=set, repr=False)

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        """The types that stages of ours compute with."""
        return tuple(getattr(torch, one.name) for one in dict.fromkeys((FLOAT32, self.element)))

    def without_notes(self) -> PassContext:
        """The same for another run."""
        return replace(self, notes=[], _known=set())

    def machine_for(self, pass_name: str) -> AnyMachine:
        """The machine, for the pass of that name; raises VerificationError if none is set."""
        if self.machine is None:
            raise VerificationError(f"{pass_name} needs a machine", fix="set PassContext.machine")
        return self.machine

    def planner_for(self, pass_name: str) -> Planner:
        """The machine's planner, for the pass of that name; raises VerificationError if no machine is set."""
        from sepc.cost_model.planner import planner_of

        return planner_of(self.machine_for(pass_name), self.threads)

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
        for index, one in enumerate(progress(self.passes, "passes"), start=1):
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
            _log(records[-1])
            for observer in self.observers:
                observer.recorded(records[-1])
        return records

    @contextmanager
    def _watched(self, one: Pass) -> Iterator[None]:
        """Tell the observers of an error within."""
        try:
            yield
        except Exception as error:  # Whatever it is: it goes on to the caller.
            for observer in self.observers:
                observer.failed(one, error)
            raise


def _log(record: PassRecord) -> None:
    """What a pass did, and at the level of debugging why."""
    did = f"{record.nodes_before} → {record.nodes_after} nodes" if record.changed else "no change"
    logger.info("%s: %s, %.1f ms", record.name, did, record.time_ms)
    for note in record.notes:
        done = "taken" if note.taken else "not taken"
        logger.debug("%s: %s: %s: %s %s", record.name, ", ".join(note.nodes), done, note.message, note.source)


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
