"""The driver: capture → passes → kernels → one callable. This page is the summary of the compiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from sepc._clock import Clock
from sepc._lowered import Lowered, load_backend
from sepc.cache import Cache
from sepc.cache_key import cache_key
from sepc.compiled import DEFAULT_SHAPE_LIMIT, CompiledModel
from sepc.cost_model.chain import Objective
from sepc.errors import InputError, KernelError, TargetError
from sepc.fallback import hand_over, unbuilt_regions
from sepc.frontend.arguments import captured_for
from sepc.frontend.export import Captured, export
from sepc.ir import region
from sepc.ir.element import ElementName
from sepc.report.regions import region_report
from sepc.runtime.report import RegionReport
from sepc.runtime.signature import Signature
from sepc.runtime.specialization import Description, Specialization
from sepc.target import Target

if TYPE_CHECKING:
    from sepc._remote import Remote
    from sepc.passes.manager import PassRecord
    from sepc.passes.observers import Observer
    from sepc.report.explanation import Explanation
    from sepc.separable.plan import Plan


def compile(  # noqa: A001 -- the public name, as PyTorch's own
    model: nn.Module | ExportedProgram,
    *,
    target: str | Target = "native",
    dtype: ElementName | torch.dtype = "float32",
    example_inputs: Sequence[Any] | None = None,
    num_threads: int | None = None,
    optimize: Objective = "time",
    shape_limit: int = DEFAULT_SHAPE_LIMIT,
    fullgraph: bool = False,
    verify_each: bool = False,
    separate: Plan | Literal["exact"] = "exact",
    runner: Remote | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
) -> CompiledModel:
    """Compile `model` for `target`. What was compiled before comes from a cache on disk, also in another process.

    Args:
        model: a module in eval mode, with parameters on the CPU, or an ExportedProgram. Kernels compute float32,
            float16 and bfloat16, all in `dtype`; PyTorch computes other types.
        target: "native", "x86-64-v3", "x86-64-v4", "arm64", or "x86:<llvm cpu>" or "arm64:<llvm cpu>"; for GPUs "cuda",
            "cuda:sm_80" and others, whose inputs are tensors of the GPU (the module stays on the CPU), or "opencl".
        dtype: the type in which kernels compute, and in which weights and intermediate results are kept: "float32", or
            "float16", of Armv8.2 and later and of GPUs, with sums of float32 where they are long, and results to some
            1e-2. Inputs and results have the model's own types either way.
        example_inputs: positional arguments to compile for now; else each new input shape compiles at its first call.
        num_threads: threads per call; by default those of ``torch.get_num_threads()`` at the call.
        optimize: "time", or "memory" for the smallest arena: chains as long and windows as small as that takes.
        shape_limit: how many input shapes may be compiled.
        fullgraph: no operator may be left to PyTorch: where one has no kernel, compiling raises ModelError.
        verify_each: run the graph before and after every pass and compare the results.
        separate: "exact" takes apart only convolutions that are separable, or of low rank, up to rounding, where that
            is predicted faster; with a plan, made by `sepc.separate` for this model, layers are replaced first.
        runner: a device that runs it, from `sepc.remote`, instead of this host.
        dump_dir: a directory for the graph after every pass, as programs and pictures, with a page ``index.html``; of
            what was compiled last, and always compiled anew.

    Raises:
        TargetError: the target is unknown, or does not compute in that type. ModelError: the model cannot be compiled.
        InputError: an input does not fit. BuildError: TVM or the C compiler is missing or failed. DeviceError: the
        runner is lost, at a call. PassError: there is a bug in a pass; it names a directory with what shows it.
    """
    if num_threads is not None and num_threads < 1:
        raise InputError(f"num_threads is {num_threads}", fix="give a positive number of threads, or none")
    if optimize not in get_args(Objective):
        choices = " or ".join(f'"{one}"' for one in get_args(Objective))
        raise InputError(f"There is nothing to optimize called {optimize!r}", fix=f"give {choices}")
    if separate != "exact":
        model = _separated(model, separate)
    for_target = Target.parse(target).computing_in(dtype)
    if runner is not None and for_target.gpu is not None:
        fix = "name a CPU as the target, or export the model and run it there"
        raise TargetError(f"A remote device does not run '{for_target.name}'", where="runner", fix=fix)
    options = num_threads, optimize, shape_limit, fullgraph, verify_each, runner, dump_dir
    compiled = CompiledModel(model, for_target, *options)
    if example_inputs is not None:
        compiled.precompile(*example_inputs)
    return compiled


def _separated(model: nn.Module | ExportedProgram, plan: object) -> nn.Module:
    """`model` with layers replaced by a plan; raises InputError where that cannot be."""
    from sepc.separable.plan import Plan

    if not isinstance(plan, Plan) or not isinstance(model, nn.Module):
        why = f"it is {plan!r}" if not isinstance(plan, Plan) else "the model is an ExportedProgram"
        fix = 'give "exact", or a module and a plan that sepc.separate made for it'
        raise InputError("This cannot be separated", where="separate", why=why, fix=fix)
    return plan.apply(model)


def explain(
    model: nn.Module | ExportedProgram,
    *inputs: Any,
    target: str | Target = "native",
    dtype: ElementName | torch.dtype = "float32",
    num_threads: int | None = None,
    optimize: Objective = "time",
    verify_each: bool = False,
) -> Explanation:
    """What becomes of `model` for these positional arguments, and why: who computes what, where the time goes.

    Nothing is run, so that any target will do; what has no kernel is told, where `compile` might refuse it. Print the
    result, or write it as a page by ``to_html(path)``, or take it as data by ``to_dict()``.

    Args:
        model: a module, or an ExportedProgram.
        *inputs: the arguments to explain it for.
        target: as all that follows, and what is raised, as for `compile`.
        dtype: the type in which kernels compute.
        num_threads: threads per call.
        optimize: "time" or "memory".
        verify_each: compare results before and after every pass.
    """
    compiled = compile(
        model, target=target, dtype=dtype, num_threads=num_threads, optimize=optimize, verify_each=verify_each
    )
    return compiled.explain(*inputs)


@contextmanager
def _alone() -> Iterator[None]:
    """One compilation at a time, Dynamo's included, as torch.export changes what all threads share; and not under the
    caller's autocast: what that is at the first call says nothing of later ones, or of other processes.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, torch.autocast("cpu", enabled=False):
        yield


@dataclass(frozen=True)
class Compiled(Specialization):
    """A specialisation that was compiled here, or taken from the cache.

    Attributes:
        compile_times_s: how long each stage took, in seconds; "imports" loads TVM and the passes.
        lower: computes `lowered`.
        run_passes: runs the passes once more, for observers to look on.
        is_complete: whether all kernels were built that should be; another time that may work.
    """

    compile_times_s: Mapping[str, float]
    lower: Callable[[], Lowered]
    run_passes: Callable[[Sequence[Observer]], object]
    is_complete: bool = True

    @cached_property
    def lowered(self) -> Lowered:
        """What the compiler knows; computed now if the kernels came from the cache."""
        with _alone():
            return self.lower()


@dataclass(frozen=True)
class _Job:
    """What a specialisation is compiled from."""

    exported: ExportedProgram
    signature: Signature
    target: Target
    threads: int
    optimize: Objective
    verify_each: bool
    runner: Remote | None
    dump_dir: str | os.PathLike[str] | None

    @property
    def runs_here(self) -> bool:
        """Whether this host runs it, other than under emulation."""
        return self.runner is None and self.target.is_runnable


@_alone()
def specialize(
    model: nn.Module | ExportedProgram,
    target: Target,
    threads: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    signature: Signature,
    optimize: Objective = "time",
    verify_each: bool = False,
    runner: Remote | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Compile `model` as it runs on ``(*args, **kwargs)``, or take it from the cache; raises what `compile` raises.

    `signature` is that of the arguments. Whether anything may be left to PyTorch is for `sepc.fallback` to say.
    """
    clock = Clock()
    exported = export(model, args, kwargs)
    job = _Job(exported, signature, target, threads, optimize, verify_each, runner, dump_dir)
    clock.lap("capture")
    # Loading an entry refuses what this host cannot run; and who verifies or dumps wants to see the passes run.
    # Of kernels for a GPU, it is the machine code that takes long, and that has a cache of its own.
    is_kept = job.runs_here and not verify_each and dump_dir is None and target.gpu is None
    cache = Cache.open() if is_kept else None
    if cache is None:
        return _compile(job, clock)

    def make() -> Compiled:
        clock.lap("cache")
        return _compile(job, clock)

    key = cache_key(job.exported, signature, target, threads, optimize)
    found = cache.get_or_make(key, target, make, keep=lambda made: made.is_complete)
    clock.lap("cache")
    if isinstance(found, Compiled):
        return found
    lower = partial(_lower_again, job, found.description.regions)
    return Compiled(found.description, found.executable, clock.laps, lower, partial(_run_passes, job))


def _compile(job: _Job, clock: Clock) -> Compiled:
    """A specialisation from scratch."""
    backend, target = load_backend(), job.target
    clock.lap("imports")
    captured, order, records = _optimized(job, clock)
    graph_module = captured.graph_module
    assembled = backend.assemble(graph_module, backend.lowering(target), job.threads)
    clock.lap("lower")
    unbuilt: dict[str, str] = {}
    try:
        executable, times = backend.build(assembled, target, job.threads, job.runner)
    except KernelError as error:
        unbuilt = unbuilt_regions(assembled.program, error)
        hand_over(graph_module, unbuilt)
        assembled = backend.assemble(graph_module, backend.lowering(target), job.threads, unbuilt)
        executable, times = backend.build(assembled, target, job.threads, job.runner)
    wrong = backend.wrong_regions(assembled.checks, executable) if job.runs_here else {}
    if wrong:
        assembled = backend.assemble(graph_module, backend.lowering(target), job.threads, {**wrong, **unbuilt})
        executable, times = backend.build(assembled, target, job.threads, job.runner)
        hand_over(graph_module, wrong)
    clock.add(times)
    description = Description(
        signature=job.signature,
        order=order,
        results=captured.results,
        threads=job.threads,
        optimize=job.optimize,
        regions=tuple(region_report(node, graph, executable) for node, graph in region.regions(graph_module)),
    )
    lowered = Lowered(graph_module, records, assembled.functions, assembled.scratch)
    run_passes = partial(_run_passes, job)
    return Compiled(description, executable, clock.laps, lambda: lowered, run_passes, is_complete=not unbuilt)


def _lower_again(job: _Job, regions: Sequence[RegionReport]) -> Lowered:
    """What the compiler knows of kernels that came from the cache, with these regions."""
    captured, _, records = _optimized(job, Clock())
    graph_module = captured.graph_module
    on_host = {one.name for one in regions if one.kernel == "torch"}
    backend = load_backend()
    assembled = backend.assemble(graph_module, backend.lowering(job.target), job.threads, on_host)
    reasons = {one.name: one.reason for one in regions}
    for node, _ in region.regions(graph_module):
        if node.name in on_host:  # As was found out by running it, when it was compiled.
            node.meta["sepc_region"] = replace(region.info(node), kernel="torch", reason=reasons[node.name])
    return Lowered(graph_module, records, assembled.functions, assembled.scratch)


@_alone()
def _run_passes(job: _Job, observers: Sequence[Observer]) -> None:
    # Whoever looks on now is nobody of those who did at first.
    _optimized(replace(job, dump_dir=None), Clock(), observers)


def _optimized(
    job: _Job, clock: Clock, observers: Sequence[Observer] = ()
) -> tuple[Captured, tuple[int, ...], list[PassRecord]]:
    """The captured graph after all passes, which argument's tensor each input is, and what the passes did."""
    # Imported late: where the cache has the kernels, none of this is needed.
    from sepc.passes.manager import PassContext, PassManager
    from sepc.passes.pipeline import pipeline
    from sepc.report.failure import Case, run_passes

    clock.lap("imports")
    captured, order = captured_for(job.exported, job.signature)
    clock.lap("capture")
    target = job.target
    context = PassContext(target=target, machine=target.planned_for, threads=job.threads, element=target.element)
    manager = PassManager(pipeline(job.optimize), job.verify_each, (*_observers(job), *observers))
    case = Case(job.exported, lambda: captured_for(job.exported, job.signature)[0])
    records = run_passes(manager, captured, context, case)
    clock.lap("passes")
    return captured, order, records


def _observers(job: _Job) -> list[Observer]:
    """Who looks on while the passes run."""
    if job.dump_dir is None:
        return []
    from sepc.report.dump import Dump

    return [Dump(Path(job.dump_dir))]
