"""The driver: capture → passes → kernels → one callable. This page is the summary of the compiler."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from sepc.compiled import DEFAULT_SHAPE_LIMIT, CompiledModel, RegionReport
from sepc.cost_model.chain import Objective
from sepc.errors import BuildError, InputError
from sepc.frontend.export import Captured, capture
from sepc.ir import ops, region
from sepc.passes.manager import PassContext, PassManager, PassRecord
from sepc.passes.pipeline import pipeline
from sepc.target import Target

if TYPE_CHECKING:
    from sepc.backends.runtime import Executable


def compile(  # noqa: A001 -- the public name, as PyTorch's own
    model: nn.Module | ExportedProgram,
    *,
    target: str | Target = "native",
    example_inputs: Sequence[Any] | None = None,
    num_threads: int | None = None,
    optimize: Objective = "time",
    shape_limit: int = DEFAULT_SHAPE_LIMIT,
    verify_each: bool = False,
) -> CompiledModel:
    """Compile `model` for `target`.

    Args:
        model: a module in eval mode, with float32 parameters on the CPU, or an ExportedProgram.
        target: "native", "x86-64-v3", "x86-64-v4" or "x86:<llvm cpu>".
        example_inputs: positional arguments to compile for now; else each new input shape compiles at its first call.
        num_threads: threads per call; by default those of ``torch.get_num_threads()`` at the call.
        optimize: "time", or "memory" for the smallest arena: chains as long and windows as small as that takes.
        shape_limit: how many input shapes may be compiled.
        verify_each: run the graph before and after every pass and compare the results.

    Raises:
        TargetError: the target is unknown. ModelError: the model cannot be compiled. InputError: an input does not fit.
        BuildError: TVM or the C compiler is missing or failed.
    """
    if num_threads is not None and num_threads < 1:
        raise InputError(f"num_threads is {num_threads}", fix="give a positive number of threads, or none")
    if optimize not in get_args(Objective):
        choices = " or ".join(f'"{one}"' for one in get_args(Objective))
        raise InputError(f"There is nothing to optimize called {optimize!r}", fix=f"give {choices}")
    compiled = CompiledModel(model, Target.parse(target), num_threads, optimize, shape_limit, verify_each)
    if example_inputs is not None:
        compiled.precompile(*example_inputs)
    return compiled


logger = logging.getLogger("sepc")


@dataclass(frozen=True)
class Specialization:
    """A model compiled for one set of input shapes."""

    captured: Captured
    graph_module: fx.GraphModule
    executable: Executable
    regions: list[RegionReport]
    passes: list[PassRecord]
    compile_times_s: Mapping[str, float]

    def run(self, tensors: Sequence[torch.Tensor], threads: int) -> Any:
        """The model's result for the tensor leaves of its arguments, whose strides are those it was compiled for."""
        return self.captured.unflatten(self.executable.run(tensors, threads))


def specialize(
    model: nn.Module | ExportedProgram,
    target: Target,
    threads: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    optimize: Objective = "time",
    verify_each: bool = False,
) -> Specialization:
    """Compile `model` as it runs on ``(*args, **kwargs)``; raises what `compile` raises."""
    assemble, build, wrong_regions = _backend()
    clock = _Clock()
    captured = capture(model, args, kwargs)
    _check_types(captured, captured.flatten(args, kwargs))
    clock.lap("capture")
    context = PassContext(target=target, machine=target.machine, threads=threads)
    records = PassManager(pipeline(optimize), verify_each=verify_each).run(captured.graph_module, context)
    clock.lap("passes")
    program = assemble(captured.graph_module, target.vector_lanes, threads)
    clock.lap("lower")
    executable = build(program, target)
    wrong = wrong_regions(executable) if target.is_runnable else {}
    if wrong:
        executable = build(assemble(captured.graph_module, target.vector_lanes, threads, wrong), target)
        _hand_over(captured.graph_module, wrong)
    times = {**clock.laps, **executable.build_times_s}
    reports = [_report(node, graph, executable) for node, graph in region.regions(captured.graph_module)]
    return Specialization(captured, captured.graph_module, executable, reports, records, times)


def _hand_over(graph_module: fx.GraphModule, wrong: Mapping[str, float]) -> None:
    """Mark the regions that TVM computed wrongly as PyTorch's, and say so in the log."""
    for node, _ in region.regions(graph_module):
        if node.name in wrong:
            reason = f"TVM's kernel differs from PyTorch by {wrong[node.name]:.2g} of the largest result"
            node.meta["sepc_region"] = replace(region.info(node), kernel="torch", reason=reason)
            logger.warning("%s runs in PyTorch: %s", node.name, reason)


def _check_types(captured: Captured, tensors: Sequence[torch.Tensor]) -> None:
    """Raise InputError if an ExportedProgram was exported for other tensors; record the strides of these."""
    for node, tensor in zip(captured.graph_module.graph.find_nodes(op="placeholder"), tensors, strict=True):
        if ops.shape(node) != tuple(tensor.shape) or ops.dtype(node) != tensor.dtype:
            raise InputError(
                f"Input '{node.name}' is {tensor.dtype} of shape {tuple(tensor.shape)}",
                why=f"the program was exported for {ops.dtype(node)} of shape {ops.shape(node)}",
                fix="export the program for this input, or compile the module instead",
            )
        if ops.strides(node) != tensor.stride():
            node.meta["val"] = node.meta["val"].as_strided(tensor.shape, tensor.stride())


def _backend() -> tuple[Any, Any, Any]:
    """The backend's entry points, imported late: TVM takes two seconds to load."""
    try:
        from sepc.backends.check import wrong_regions
        from sepc.backends.program import assemble
        from sepc.backends.runtime import build
    except ImportError as error:
        raise BuildError(
            "TVM cannot be imported",
            why=str(error),
            fix="pip install 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi==0.1.14.post1'",
        ) from error
    return assemble, build, wrong_regions


def _report(node: fx.Node, graph: fx.GraphModule, executable: Executable) -> RegionReport:
    info, choice = region.info(node), node.meta.get("sepc_tiling")
    names = tuple(str(inner.target).removeprefix("aten.") for inner in region.computations(graph))
    cost = choice.cost if choice is not None and info.kernel == "sepc" else None
    values = [node, *node.all_input_nodes]
    values += [inner for inner in graph.graph.nodes if inner.op == "get_attr"]
    moved = sum(
        ops.tensor(v).numel() * ops.dtype(v).itemsize for v in values if isinstance(v.meta["val"], torch.Tensor)
    )
    return RegionReport(
        name=node.name,
        kind=info.kind,
        ops=names,
        kernel=info.kernel,
        reason=info.reason,
        tiling=str(choice.tiling) if choice is not None and cost is not None else "",
        predicted_us=cost.time_us if cost is not None else 0.0,
        bytes_moved=moved,
        flops=cost.flops if cost is not None else 0,
        symbols=executable.program.symbols[node.name],
    )


class _Clock:
    """Splits elapsed time into named laps, in seconds."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the lap `name`."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
