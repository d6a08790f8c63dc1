"""Capture a model as a functional ATen graph with torch.export.

The captured graph takes the tensor leaves of the user's arguments, flattened in pytree order, and returns the tensor
leaves of the user's result as one flat tuple. Everything else in the arguments (numbers, flags, None) is specialised,
and everything else in the result is a constant; `Captured` remembers both, and maps between the user's structures and
the graph's tuples.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.utils import _pytree as pytree

from sepc.errors import InputError, ModelError
from sepc.frontend.failures import guarded
from sepc.ir.origin import Origin, source_line
from sepc.runtime.signature import Constant, Results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

aten = torch.ops.aten
# What tensors may hold. Kernels compute in float32: `sepc.passes.promote` has them compute the halves, too; PyTorch
# computes the rest.
TYPES = (
    torch.float32,
    *(torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# What PyTorch computes by views and products of two tensors anyway.
_DECOMPOSED = (aten.einsum.default,)
_TRAINING_OPS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.native_dropout.default,
)


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph_module: the graph; see docs/architecture.md, 'Captured graph'.
        input_spec: the pytree of ``(args, kwargs)``.
        results: how the user's result is made of the graph's flat one.
        input_names: names of the placeholders, in order.
        input_leaves: per leaf of `input_spec` the index of its placeholder, or the value that export specialised.
    """

    graph_module: fx.GraphModule
    input_spec: pytree.TreeSpec
    results: Results
    input_names: tuple[str, ...]
    input_leaves: tuple[int | Constant, ...]

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The graph's inputs for a call ``model(*args, **kwargs)``.

        Raises InputError if the structure differs from the captured one, a leaf that was a tensor is none, or a value
        that the graph was specialised for has changed. Shapes and dtypes are not looked at.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), _in_order(kwargs, self.input_spec)))
        if spec != self.input_spec:
            why = f"expected {self.input_spec}, got {spec}"
            raise InputError(
                "The arguments have another structure than at capture", why=why, fix="compile again for them"
            )
        tensors: list[torch.Tensor] = []
        for leaf, place in zip(leaves, self.input_leaves, strict=True):
            if isinstance(place, Constant):
                if type(leaf) is not type(place.value) or leaf != place.value:
                    why = f"the model was captured with {place.value!r}, and is called with {leaf!r}"
                    raise InputError(
                        "An argument that is not a tensor has changed", why=why, fix="compile again for it"
                    )
            elif isinstance(leaf, torch.Tensor):
                tensors.append(leaf)
            else:
                why = f"it is {type(leaf).__name__}"
                raise InputError("An argument must be a tensor", where=self.input_names[place], why=why)
        return tensors

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The ``(args, kwargs)`` of the call whose inputs of the graph are `tensors`."""
        leaves = [one.value if isinstance(one, Constant) else tensors[one] for one in self.input_leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.input_spec)
        return args, kwargs

    def unflatten(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The user's result from the graph's flat `outputs`."""
        return self.results.unflatten(outputs)


def capture(
    model: nn.Module | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Captured:
    """Capture `model` as it runs on ``(*args, **kwargs)``.

    The graph's constants share memory with the model's parameters and buffers. An ExportedProgram keeps the shapes that
    it was exported with, and ignores `args` and `kwargs`.

    Raises:
        ModelError: the model is in training mode, has parameters that are not on the CPU or of none of `TYPES`, changes
            its inputs or buffers, has dynamic shapes, or cannot be exported.
        InputError: the arguments are not those of the model's `forward`; a tensor among them is not on the CPU, or of
            none of `TYPES`.
    """
    return finish(export(model, args, kwargs))


def export(
    model: nn.Module | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> ExportedProgram:
    """The first half of `capture`, what torch.export makes of `model`: as yet with ATen's operators of training."""
    if isinstance(model, ExportedProgram):
        _check_parameters((name, value) for name, value in model.state_dict.items() if isinstance(value, nn.Parameter))
        return model
    _check_modes(model)
    _check_parameters(model.named_parameters())
    _check_call(model, args, kwargs or {})
    _check_inputs(args, kwargs or {})
    exported = guarded(lambda: torch.export.export(model, tuple(args), dict(kwargs or {})), model)
    exported.example_inputs = None  # They would live as long as the program.
    return exported


def finish(exported: ExportedProgram) -> Captured:
    """The second half of `capture`: from what torch.export made to a functional graph with its constants."""
    program = guarded(lambda: exported.run_decompositions(_decompositions(exported)))
    _check_signature(program)
    _check_nodes(program)
    return _unlift(program)


def _decompositions(program: ExportedProgram) -> dict[OpOverload, Callable[..., Any]]:
    """How PyTorch decomposes the operators of `program` that are not to stay whole; its table takes 0.3 s to make."""
    called = {node.target for node in program.graph.nodes}
    wanted = [operator for operator in _DECOMPOSED if operator in called]
    if not wanted:
        return {}
    table = torch.export.default_decompositions()
    return {operator: table[operator] for operator in wanted}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _acts_in_training(module: nn.Module) -> bool:
    """Whether `module` computes something else in training mode: it drops values at random or uses batch statistics."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm | nn.RReLU):
        return True
    rates = (getattr(module, name, None) for name in ("p", "drop_prob", "drop_rate", "dropout"))
    is_leaf = next(module.children(), None) is None
    return is_leaf and any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _check_modes(model: nn.Module) -> None:
    named = ((name or type(model).__name__, module) for name, module in model.named_modules())
    found = [name for name, module in named if module.training and _acts_in_training(module)]
    if found:
        why = "these submodules behave differently in training: " + _listed(found)
        raise ModelError("The model is in training mode", where=found[0], why=why, fix="call model.eval() first")


def _check_parameters(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, value in parameters:
        if value.device.type != "cpu":
            fix = "load the weights" if value.device.type == "meta" else "call model.cpu() first"
            raise ModelError(
                "The model is not on the CPU", where=name, why=f"this parameter is on {value.device}", fix=fix
            )
        if value.dtype not in TYPES:
            why = f"this parameter is {_short(value.dtype)}; supported are {', '.join(map(_short, TYPES))}"
            raise ModelError("A parameter has an unsupported type", where=name, why=why, fix="call model.float() first")


def _check_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        where, fix = f"{type(model).__name__}.forward{signature}", "call it with the arguments that it takes"
        raise InputError("The arguments are not those of the model", where=where, why=str(error), fix=fix) from error


def _check_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    paths, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    for path, leaf in paths:
        if not isinstance(leaf, torch.Tensor):
            continue
        where = ("kwargs" if path[0] == pytree.SequenceKey(1) else "args") + pytree.keystr(path[1:])
        if leaf.device.type != "cpu":
            raise InputError(
                "An input is not on the CPU", where=where, why=f"it is on {leaf.device}", fix="move it: x.cpu()"
            )
        if leaf.dtype not in TYPES:
            why = f"it is {_short(leaf.dtype)}; supported are {', '.join(map(_short, TYPES))}"
            raise InputError("An input has an unsupported type", where=where, why=why, fix="convert it: x.float()")


def _check_signature(program: ExportedProgram) -> None:
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT:
            continue
        node = next((node for node in program.graph.nodes if node.name == getattr(spec.arg, "name", None)), None)
        what = f"buffer {spec.target!r}" if spec.kind == OutputKind.BUFFER_MUTATION else f"input {spec.target!r}"
        where = source_line(node.stack_trace) if node is not None else ""
        why = f"it writes to its {what} ({spec.kind.name.lower()})"
        raise ModelError(
            "The model changes its own state or its inputs", where=where, why=why, fix="return a new tensor"
        )


def _check_nodes(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        where = source_line(node.stack_trace)
        values = pytree.tree_leaves(node.meta.get("val"))
        if any(isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) for value in values) or any(
            isinstance(size, torch.SymInt)
            for value in values
            if isinstance(value, torch.Tensor)
            for size in value.shape
        ):
            fix = "every shape must follow from the inputs' shapes alone; export programs without dynamic_shapes"
            raise ModelError(
                "The model has a dynamic shape", where=where or node.name, why=f"at {node.name!r}", fix=fix
            )
        if isinstance(node.target, HigherOrderOperator):
            why = f"it contains {node.target}, which runs a nested graph"
            raise ModelError("The model has control flow in its graph", where=where, why=why)
        _check_operand_types(node)
        training = node.target in _TRAINING_OPS and True in node.args
        if training or node.target in (
            aten._native_batch_norm_legit.default,
            aten._native_batch_norm_legit_functional.default,
        ):
            why = f"{node.target} runs in its training form"
            raise ModelError("The model is in training mode", where=where, why=why, fix="call model.eval() first")


# Operators that take operands of one type only; PyTorch finds that out when it runs them, not while tracing.
_PRODUCTS = frozenset(
    (*(f"conv{rank}d" for rank in (1, 2, 3)), *(f"conv_transpose{rank}d" for rank in (1, 2, 3)), "convolution")
) | {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm"}


def _check_operand_types(node: fx.Node) -> None:
    if not isinstance(node.target, OpOverload) or node.target._opname not in _PRODUCTS:
        return
    types = [operand.meta["val"].dtype for operand in node.all_input_nodes]
    if len(set(types)) > 1:
        raise ModelError(
            f"The operands of {node.target} are of different types",
            where=source_line(node.stack_trace),
            why=f"they are {' and '.join(map(_short, types))}",
            fix="convert the input to the type of the parameters",
        )


def _in_order(kwargs: Mapping[str, Any], spec: pytree.TreeSpec) -> dict[str, Any]:
    """`kwargs` in the order of `spec`, since a caller may write them in any order; unchanged if the names differ."""
    names = list(spec.child(1).context or ())
    return {name: kwargs[name] for name in names} if set(names) == set(kwargs) else dict(kwargs)


class _Names:
    """Flat attribute names, each given out once."""

    def __init__(self) -> None:
        self._used: set[str] = set(dir(fx.GraphModule))

    def take(self, target: str) -> str:
        flat = "".join(character if character.isalnum() else "_" for character in target)
        flat = f"constant_{flat}" if not flat.isidentifier() else flat
        name, count = flat, 0
        while name in self._used:
            count += 1
            name = f"{flat}_{count}"
        self._used.add(name)
        return name


def _state(program: ExportedProgram, spec: InputSpec) -> torch.Tensor:
    target = str(spec.target)
    value = program.state_dict.get(target, program.constants.get(target))
    if not isinstance(value, torch.Tensor):
        raise ModelError("A constant of the model is not a tensor", where=target, why=f"it is {type(value).__name__}")
    if value.device.type != "cpu" or value.dtype not in TYPES:
        raise ModelError(
            "A constant of the model is not supported", where=target, why=f"it is {value.dtype} on {value.device}"
        )
    return value.detach()


def _unlift(program: ExportedProgram) -> Captured:
    """Turn the lifted state into ``get_attr`` nodes, and drop what is no tensor from inputs and outputs."""
    graph, root, names = fx.Graph(), nn.Module(), _Names()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    copies: dict[fx.Node, fx.Node] = {}
    input_names: list[str] = []
    input_leaves: list[int | Constant] = []
    for node in program.graph.nodes:
        spec = specs.get(node.name)
        if node.op == "placeholder" and spec is not None and spec.kind in _STATE:
            name = names.take(str(spec.target))
            root.register_buffer(name, _state(program, spec))
            copy = graph.get_attr(name)
            copy.meta["val"] = node.meta["val"].detach()
        elif node.op == "placeholder" and not isinstance(node.meta.get("val"), FakeTensor):
            input_leaves.append(Constant(node.meta.get("val")))
            continue
        elif node.op == "output" or (not node.users and node.meta.get("val") is None):
            continue  # What has neither users nor a value is an assertion that export has already decided.
        else:
            copy = graph.node_copy(node, copies.__getitem__)
            copy.meta = {
                key: value for key, value in node.meta.items() if key in ("val", "stack_trace", "nn_module_stack")
            }
            if node.op == "placeholder":
                input_leaves.append(len(input_names))
                input_names.append(copy.name)
        copy.meta["sepc_origin"] = Origin("frontend", (node.name,), source_line(node.stack_trace))
        copies[node] = copy
    output_leaves = _copy_output(program, graph, copies)
    call_spec = program.call_spec
    if call_spec.in_spec is None or call_spec.out_spec is None:
        raise ModelError("The exported program does not say how it is called", why="its call_spec is empty")
    return Captured(
        graph_module=fx.GraphModule(root, graph, class_name="Captured"),
        input_spec=call_spec.in_spec,
        results=Results(call_spec.out_spec, tuple(output_leaves)),
        input_names=tuple(input_names),
        input_leaves=tuple(input_leaves),
    )


def _copy_output(program: ExportedProgram, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node]) -> list[int | Constant]:
    tensors: list[fx.Node] = []
    leaves: list[int | Constant] = []
    (results,) = program.graph.output_node().args
    assert isinstance(results, list | tuple)
    for result in results:
        if isinstance(result, fx.Node) and result in copies:
            leaves.append(len(tensors))
            tensors.append(copies[result])
        else:  # An input that export specialised, given back, or a value computed in Python.
            leaves.append(Constant(result.meta.get("val") if isinstance(result, fx.Node) else result))
    graph.output(tuple(tensors))
    return leaves
