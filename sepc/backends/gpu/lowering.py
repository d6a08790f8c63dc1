"""How the regions of a graph become kernels of a GPU.

Convolutions and chains of them with a `GpuTiling` are computed by blocks of threads together. Everything else is what
the stages of CPUs emit: a task per thread, or with a `TeamTiling` one for each team of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from torch import fx

from sepc.backends import generic
from sepc.backends.arguments import Argument, Arguments, Result
from sepc.backends.gpu.blocks import BlockLink, BlockStage, dynamic_shared_bytes, grid
from sepc.backends.gpu.kernel import LAUNCH, BlockFrame, block_function, shared_function, task_function
from sepc.backends.gpu.links import Constants, pack_bias, pack_weights, padded_channels
from sepc.backends.gpu.source import ALIGNED
from sepc.backends.gpu.storage import VECTOR_BYTES
from sepc.backends.gpu.teams import team_function
from sepc.backends.lowering import copied, row_tiling
from sepc.backends.makers import bias_of, weight_of
from sepc.backends.regions import (
    LoweredKernel,
    finish,
    lower,
    lower_concatenation,
    operand_names,
    source_name,
)
from sepc.backends.sink import expression_of, extents_of, sink_of
from sepc.backends.stages.vector import Expr, Operand
from sepc.cost_model.gpu_machine import VECTOR, GpuMachine, lanes_of
from sepc.cost_model.gpu_tiling import GpuLink, GpuTiling, shared_bytes
from sepc.cost_model.tiling import TeamTiling, Tiling
from sepc.errors import TargetError, VerificationError
from sepc.ir import ops, region
from sepc.ir.convolution import Convolution
from sepc.ir.layout import layout
from sepc.ir.problem import Problem, Strides
from sepc.ir.stage import Map
from sepc.passes.choose_tiling import chain_problems, choice, region_problem


@dataclass(frozen=True)
class GpuLowering:
    """Kernels for `machine`."""

    machine: GpuMachine

    def kernels(self, node: fx.Node, graph: fx.GraphModule) -> list[LoweredKernel]:
        """See `sepc.backends.lowering.Lowering`."""
        return [_launchable(kernel, node) for kernel in self._kernels(node, graph)]

    def _kernels(self, node: fx.Node, graph: fx.GraphModule) -> list[LoweredKernel]:
        info, tiling = region.info(node), choice(node).tiling
        if info.kind == "concatenation":
            given, tasks = copied(node, graph), row_tiling(node)
            if given is None:
                return []
            strides = layout(node).strides
            return [lower_concatenation(graph, given, strides, tasks, VECTOR, task_function, vector_tasks)]
        if isinstance(tiling, GpuTiling):
            problems = chain_problems(node, graph) if info.kind == "chain" else (region_problem(node, graph),)
            require_fit(tiling, problems, self.machine, node.name)
            return [lower_blocks(graph, problems, tiling)]
        if isinstance(tiling, TeamTiling):
            return lower(graph, region_problem(node, graph), tiling.task, VECTOR, team_function(tiling))
        return lower_tasks(graph, region_problem(node, graph), tiling)

    def generic(self, graph: fx.GraphModule, name: str) -> generic.GenericRegion | generic.Rejection:
        """See `sepc.backends.lowering.Lowering`."""
        lowered = generic.lower(graph, name, VECTOR)
        if isinstance(lowered, generic.Rejection):
            return lowered
        kernels = tuple(
            replace(one, function=shared_function(one.function, one.tasks).with_attr(ALIGNED, []))
            for one in lowered.kernels
        )
        return replace(lowered, kernels=kernels)


def lower_tasks(graph: fx.GraphModule, problem: Problem, tiling: Tiling) -> list[LoweredKernel]:
    """The kernels of a region whose tasks are those of single threads."""
    return lower(graph, vector_tasks(problem), tiling, VECTOR, task_function)


def vector_tasks(problem: Problem) -> Problem:
    """An elementwise problem with a row for each vector, so that threads next to each other have vectors that are.

    Any other one stays as it is.
    """
    stage = problem.stage
    if not isinstance(stage, Map) or problem.anchor is not None:
        return problem
    *outer, inner = stage.extents
    most = lanes_of(stage.element)
    lanes = next(width for width in (most, most // 2, most // 4, 1) if inner % width == 0)

    def split(strides: Strides) -> Strides:
        return (*strides[:-1], strides[-1] * lanes, strides[-1])

    return replace(
        problem,
        stage=replace(stage, extents=(*outer, inner // lanes, lanes)),
        operands={node: split(strides) for node, strides in problem.operands.items()},
        result=split(problem.result),
    )


def lower_blocks(graph: fx.GraphModule, problems: Sequence[Problem], tiling: GpuTiling) -> LoweredKernel:
    """The kernel of a region, a convolution or a chain of them, whose blocks compute together."""
    arguments = Arguments(graph, VECTOR)
    first, last = problems[0], problems[-1]
    source = source_name(first, arguments)
    sizes = [tiling.chunk or tiling.channels] * (len(problems) - 1) + [tiling.channels]
    packed = [
        _packed(problem, size, link, arguments)
        for problem, size, link in zip(problems, sizes, tiling.links, strict=True)
    ]
    names = [operand_names(problem, arguments) for problem in problems]
    out = arguments.result(extents_of(last), last.result)

    def body(frame: BlockFrame) -> None:
        buffers = frame.buffers
        links = [
            BlockLink(conv, constants(buffers), anchor, expression_of(problem, buffers, own))
            for (conv, anchor, constants), problem, own in zip(packed, problems, names, strict=True)
        ]
        read, write = Operand(buffers[source], first.source), Operand(buffers[out], last.result)
        BlockStage(frame, links, tiling, read, sink_of(last, buffers, names[-1], write)).emit()

    conv = packed[-1][0]
    images, rows, columns, channels = grid(conv, tiling)
    blocks = images * rows * columns * channels
    dynamic = dynamic_shared_bytes([one for one, _, _ in packed], tiling)
    return finish(arguments, block_function(arguments.parameters, body, blocks, tiling.threads, dynamic))


ConstantsOf = Callable[[dict[str, Expr]], Constants]


def _packed(
    problem: Problem, size: int, link: GpuLink, arguments: Arguments
) -> tuple[Convolution, fx.Node, ConstantsOf]:
    """The layer and its node, and what gives its packed constants in a frame; adds these to `arguments`."""
    conv, anchor = problem.stage, problem.anchor
    if not isinstance(conv, Convolution) or anchor is None:
        raise VerificationError("A tiling does not fit its stage", why=f"GpuTiling for {type(conv).__name__}")
    channels = padded_channels(conv.out_channels, min(size, conv.out_channels), link)
    weight = arguments.constant("weight", pack_weights(weight_of(anchor, conv, arguments), channels))
    bias = bias_of(anchor, arguments)
    name = "" if bias is None else arguments.constant("bias", pack_bias(bias, channels))
    return conv, anchor, lambda buffers: Constants(buffers[weight], buffers.get(name), channels)


def require_fit(tiling: GpuTiling, problems: Sequence[Problem], machine: GpuMachine, name: str) -> None:
    """Nothing, if `machine` can run blocks of `tiling`; raises TargetError where it cannot."""
    convs = [problem.stage for problem in problems if isinstance(problem.stage, Convolution)]
    shared = shared_bytes(convs, tiling.rows, tiling.columns, tiling.channels, tiling.chunk)
    limits = (
        (shared, machine.shared_kib_per_block << 10, "bytes of shared memory"),
        (tiling.threads, machine.threads_per_block, "threads"),
    )
    for needed, limit, what in limits:
        if needed > limit:
            raise TargetError(
                f"The tiling of '{name}' does not fit {machine.name}",
                where=str(tiling),
                why=f"a block needs {needed} {what}, and {limit} is the most that there are",
                fix="give smaller tiles, or a smaller chunk",
            )


def _launchable(kernel: LoweredKernel, node: fx.Node) -> LoweredKernel:
    """`kernel` with what the region's memory says of its pointers."""
    function = kernel.function
    blocks, threads, _ = map(int, function.attrs[LAUNCH])
    pairs = zip(function.params, kernel.arguments, strict=True)
    aligned = [str(parameter.name) for parameter, argument in pairs if _is_aligned(argument, node)]
    function = function.with_attr(ALIGNED, aligned).with_attr("global_symbol", "kernel")
    name = f"sepc_{tvm_ffi.structural_hash(function) & 0xFFFFFFFFFFFFFFFF:016x}"
    return LoweredKernel(name, function.with_attr("global_symbol", name), kernel.arguments, blocks * threads)


def _is_aligned(argument: Argument, node: fx.Node) -> bool:
    """Whether a pointer is a multiple of 16 bytes: memory blocks and constants are."""
    if isinstance(argument, Result):
        value = region.owners(node)[argument.position]
    elif isinstance(argument, int):
        value = region.inputs(node)[argument]
    else:
        return True
    return layout(value).offset * ops.dtype(value).itemsize % VECTOR_BYTES == 0
