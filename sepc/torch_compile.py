"""The backend "sepc" of torch.compile: each graph that Dynamo finds becomes a `CompiledModel`.

Dynamo divides a program into graphs, guards them, and hands over each with its parameters and buffers among the
inputs. Here those are *weights*: constants of what is compiled, which is what lets passes fold and pack them. So each
call makes sure that they are still what was compiled (`sepc.frontend.weights`), and a graph whose weights have changed
runs in PyTorch until they stand still from one call to the next; then it is compiled anew. Sizes that Dynamo leaves
open are fixed by the call: each shape compiles once, as with `sepc.compile`.

A graph that cannot be compiled so that it does just what PyTorch would do runs in PyTorch, and a warning says why: it
needs gradients, it writes to its inputs or buffers, or `sepc.compile` refuses it. Results that PyTorch gives as views
of inputs, weights or other results are made into such views. With the option `fullgraph` that is a ModelError.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn
from torch.fx import traceback

from sepc._compile import compile as sepc_compile
from sepc.errors import InputError, ModelError, SepcError
from sepc.frontend.effects import Effect, effects_of, expected_effects, misplaced, put_right, state
from sepc.frontend.weights import Weights

logger = logging.getLogger(__name__)

# What `sepc.compile` takes, but for what Dynamo gives.
OPTIONS: Final = tuple(
    name for name in inspect.signature(sepc_compile).parameters if name not in ("model", "example_inputs")
)
# How many sets of weights one graph is compiled for: instances of one class of modules share their graphs.
WEIGHTS_LIMIT: Final = 64


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> Callable[..., Any]:
    """What torch.compile calls for each graph: ``torch.compile(model, backend="sepc", options={"num_threads": 1})``.

    Options are keyword arguments of `sepc.compile`. Raises InputError for one that there is not, which Dynamo wraps in
    an exception of its own, as it does with all that a backend raises.
    """
    options = dict(options or {})
    unknown = [name for name in options if name not in OPTIONS] + list(more)
    if unknown:
        raise InputError(
            f"The backend 'sepc' has no option {', '.join(map(repr, unknown))}",
            where="torch.compile",
            fix=f"options={{...}} takes {', '.join(OPTIONS)}",
        )
    # Wrong values are found out now, for the first graph.
    sepc_compile(graph_module, **options).target.require_runnable()
    eager = _Eager(graph_module, bool(options.get("fullgraph")))
    if _needs_gradients(graph_module, example_inputs):
        fix = "call the model under torch.no_grad(), if you need no gradients"
        eager.accept(ModelError("Kernels compute no gradients, and this graph needs them", fix=fix))
        return eager
    return _Compiler(eager, _weight_places(graph_module, example_inputs), options)


def _needs_gradients(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether autograd would record something of the graph. What this depends on is guarded by Dynamo."""
    tensors = [one for one in (*inputs, *graph_module.parameters()) if isinstance(one, torch.Tensor)]
    if not any(one.requires_grad for one in tensors):
        return False
    switches = graph_module.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    return torch.is_grad_enabled() or any(node.args[0] for node in switches)


def _weight_places(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Which inputs are parameters or buffers of modules: what Dynamo expects to stay where it is."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return tuple(
        place
        for place, (node, given) in enumerate(zip(placeholders, inputs, strict=True))
        if isinstance(given, nn.Parameter) or "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    )


class _Eager:
    """A graph as PyTorch runs it."""

    _told: ClassVar[set[str]] = set()

    def __init__(self, graph_module: fx.GraphModule, is_forbidden: bool) -> None:
        self.graph_module, self._is_forbidden = graph_module, is_forbidden

    def __call__(self, *args: Any) -> Any:
        """The graph's results."""
        return self.graph_module(*args)

    def accept(self, reason: SepcError) -> None:
        """Say why the graph runs in PyTorch, for each reason once; raises `reason` where it must not."""
        if self._is_forbidden:
            raise reason
        text = " ".join(str(reason).split())
        level = logging.INFO if text in self._told else logging.WARNING
        self._told.add(text)
        logger.log(level, "a graph of torch.compile runs in PyTorch: %s", text)


class _Compiler:
    """A graph of Dynamo's as a function that compiles when it is called with new weights or shapes."""

    def __init__(self, eager: _Eager, places: tuple[int, ...], options: Mapping[str, Any]) -> None:
        self._eager, self._places, self._options = eager, places, options
        self._own = tuple(state(eager.graph_module).values())
        self._frozen: dict[tuple[int, ...], _Frozen] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """The graph's results."""
        weights = [*[args[place] for place in self._places], *self._own]
        # A tensor that dies takes its entry along, so nothing else can have its number while the entry is there.
        key = tuple(map(id, weights))
        frozen = self._frozen.get(key)
        if frozen is None:
            frozen = self._freeze(key, weights)
        elif not frozen.weights.hold(weights):
            # Not compiled at once: they may change before every call.
            self._freeze(key, weights)
            logger.info("weights of a compiled graph have changed: this call runs in PyTorch")
            frozen = None
        return self._eager(*args) if frozen is None else frozen(*args)

    def _freeze(self, key: tuple[int, ...], weights: Sequence[torch.Tensor]) -> _Frozen | None:
        """The graph with these weights, yet to be compiled; None if that cannot be, with the reason in the log."""
        with self._lock:
            if key not in self._frozen and len(self._frozen) >= WEIGHTS_LIMIT:
                why = f"it is compiled for {WEIGHTS_LIMIT} sets of weights, the limit"
                self._eager.accept(ModelError("A graph has too many weights", why=why))
                return None
            if any(one.is_inference() for one in weights):
                why = "they were made in inference mode, where PyTorch does not count changes"
                fix = "make the model outside of inference mode"
                self._eager.accept(ModelError("Weights cannot be constants", why=why, fix=fix))
                return None
            held = Weights(weights, lambda: self._frozen.pop(key, None))
            bound = _Bound(self._eager.graph_module, self._places, weights)
            frozen = self._frozen[key] = _Frozen(self._eager, bound, held, self._options)
            return frozen


class _Bound(nn.Module):
    """A graph with its weights as buffers of a module; they share their memory."""

    def __init__(self, graph_module: fx.GraphModule, places: Sequence[int], weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.graph_module, self.places = graph_module, frozenset(places)
        # Guarded by Dynamo, so it is the same at every call.
        self._autocast_type = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        for place, weight in zip(places, weights, strict=False):
            # Another tensor of the same memory, so that it does not keep the parameter itself alive.
            self.register_buffer(f"weight_{place}", weight.detach())

    def forward(self, *inputs: Any) -> Any:
        """The graph's results for all its other inputs."""
        others, total = iter(inputs), len(inputs) + len(self.places)
        args = [getattr(self, f"weight_{place}") if place in self.places else next(others) for place in range(total)]
        # Not if it is off: torch.export makes of it a nested graph, whose nodes do not know the user's source lines.
        autocast = torch.autocast("cpu", self._autocast_type) if self._autocast_type else nullcontext()
        with traceback.preserve_node_meta(), autocast:
            return fx.Interpreter(self.graph_module).run(*args)


class _Frozen:
    """A graph that is compiled with its weights."""

    def __init__(self, eager: _Eager, bound: _Bound, weights: Weights, options: Mapping[str, Any]) -> None:
        self.weights = weights
        self._eager, self._places = eager, bound.places
        self._model = sepc_compile(bound, **options)
        self._held = list(state(eager.graph_module).values())
        self._placements: dict[Any, _Placement | None] = {}

    def __call__(self, *args: Any) -> Any:
        """The graph's results."""
        inputs = [one for place, one in enumerate(args) if place not in self._places]
        key = tuple((one.shape, one.stride()) if isinstance(one, torch.Tensor) else one for one in inputs)
        if key not in self._placements:
            self._placements[key] = self._compile(args, inputs)
        placement = self._placements[key]
        if placement is None:
            return self._eager(*args)
        results = self._model(*inputs)
        if not placement.places:
            return results
        return put_right(results, placement.places, placement.expected, [*args, *self._held])

    def _compile(self, args: Sequence[Any], inputs: Sequence[Any]) -> _Placement | None:
        """Compile for these inputs, and run it once; None if it cannot do to memory what PyTorch does."""
        try:
            expected = expected_effects(self._eager.graph_module, args)
            found = effects_of(self._model(*inputs), [*args, *self._held])
            return _Placement(tuple(misplaced(expected, found)), tuple(expected))
        except (ModelError, InputError) as error:
            self._eager.accept(error)
            return None


@dataclass(frozen=True)
class _Placement:
    """Where results lie in PyTorch, and which of those compiled lie elsewhere."""

    places: tuple[int, ...]
    expected: tuple[Effect, ...]
