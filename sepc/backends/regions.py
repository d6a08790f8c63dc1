"""From a region with its tiling to a kernel: its stage is emitted with its elementwise operators as the sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm_ffi
from torch import fx

from sepc.backends.arguments import LINE_BYTES, THREAD_GAP_BYTES, Argument, Arguments
from sepc.backends.makers import stage_maker, statistics_maker
from sepc.backends.sink import Sink, extents_of, sink_of
from sepc.backends.stages.chain import ChainStage
from sepc.backends.stages.elementwise import Expression
from sepc.backends.stages.kernel import Frame, Parameter, build_function
from sepc.backends.stages.vector import Expr, Operand, Ring
from sepc.cost_model.tiling import (
    ChainTiling,
    RowTiling,
    Tiling,
)
from sepc.ir import ops
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import Convolution
from sepc.ir.element import Element
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.links import chain_of
from sepc.ir.phases import Interleaved
from sepc.ir.problem import Problem, Strides, copy_problem
from sepc.ir.region import computations, placeholders, result
from sepc.ir.stage import Pooling


@dataclass(frozen=True)
class LoweredKernel:
    """A kernel and what its pointer parameters are.

    Attributes:
        name: symbol of the kernel; equal for equal kernels.
        function: tirx PrimFunc with raw C calling convention.
        arguments: what each pointer is, in order.
        threads: how many threads run it; 0 where that is known at the call only.
    """

    name: str
    function: Expr
    arguments: tuple[Argument, ...]
    threads: int = 0


Build = Callable[[Sequence[Parameter], Callable[[Frame], None]], Expr]
"""Makes the function of a kernel of its parameters and what emits its body; `build_function` makes that of a CPU."""


def lower(
    region: fx.GraphModule, problem: Problem, tiling: Tiling, lanes: int, build: Build = build_function
) -> list[LoweredKernel]:
    """The kernels of `region`, whose loop nest is `problem`, with vectors of `lanes` float32: one for each phase."""
    kernels = [_lower_stage(region, problem, tiling, lanes, build)]
    if isinstance(problem.stage, GroupNormalization):
        kernels.insert(0, _lower_statistics(region, problem, tiling, lanes, build))
    return kernels


def _lower_stage(region: fx.GraphModule, problem: Problem, tiling: Tiling, lanes: int, build: Build) -> LoweredKernel:
    """The kernel that computes the results."""
    arguments = Arguments(region, lanes)
    source = source_name(problem, arguments)
    make = stage_maker(problem, tiling, arguments)
    names = operand_names(problem, arguments)
    out = arguments.result(extents_of(problem), problem.result)
    means = arguments.result(extents_of(problem), problem.row_means, 1)

    def body(frame: Frame) -> None:
        read = Operand(frame.buffers.get(source), problem.source)
        write = Operand(frame.buffers[out], problem.result)
        make(frame, read, sink_of(problem, frame.buffers, names, write, means)).emit(frame)

    return finish(arguments, build(arguments.parameters, body))


def _lower_statistics(
    region: fx.GraphModule, problem: Problem, tiling: Tiling, lanes: int, build: Build
) -> LoweredKernel:
    """The kernel that finds the statistics of a group normalisation."""
    arguments = Arguments(region, lanes)
    source = source_name(problem, arguments)
    make = statistics_maker(problem, tiling, arguments)

    def body(frame: Frame) -> None:
        make(frame, Operand(frame.buffers.get(source), problem.source)).emit(frame)

    return finish(arguments, build(arguments.parameters, body))


def lower_chain(region: fx.GraphModule, problems: Sequence[Problem], tiling: ChainTiling, lanes: int) -> LoweredKernel:
    """The kernel of `region`, a chain whose links have loop nests `problems`; it needs scratch for each thread."""
    arguments = Arguments(region, lanes)
    first, last = problems[0], problems[-1]
    source = source_name(first, arguments)
    chain = chain_of(problems)
    turn_rows = chain.rows_for(tiling.step)
    makers = [
        stage_maker(problem, block, arguments, rows)
        for problem, block, rows in zip(problems, tiling.links, turn_rows, strict=True)
    ]
    names = [operand_names(problem, arguments) for problem in problems]
    out = arguments.result(extents_of(last), last.result)
    means = arguments.result(extents_of(last), last.row_means, 1)
    kept = [problem.result_element for problem in problems[:-1]]
    rings = [_ring_bytes(own, one) for own, one in zip(chain.ring_elements(tiling.step), kept, strict=True)]
    starts = [sum(rings[:index]) for index in range(len(rings))]
    per_thread = sum(rings) + THREAD_GAP_BYTES
    scratch = {element: arguments.scratch(per_thread, element=element) for element in kept}

    def body(frame: Frame) -> None:
        between = []
        for problem, element, start, rows in zip(problems, kept, starts, turn_rows, strict=False):
            place = frame.thread * (per_thread // element.size_bytes) + start // element.size_bytes
            between.append(Ring(frame.buffers[scratch[element]], problem.result, place, rows=rows))
        reads = [Operand(frame.buffers.get(source), first.source), *between]
        writes = [*between, Operand(frame.buffers[out], last.result)]
        stages = [
            make(frame, read, sink_of(problem, frame.buffers, own, write, means if problem is last else ""))
            for problem, make, read, write, own in zip(problems, makers, reads, writes, names, strict=True)
        ]
        ChainStage(chain, stages, tiling.rows, tiling.step).emit(frame)

    return finish(arguments, build_function(arguments.parameters, body))


def source_name(problem: Problem, arguments: Arguments) -> str:
    """Add the anchor's input to `arguments`; returns its parameter name, empty where there is no anchor."""
    return "" if problem.input is None else arguments.tensor(problem.input, *_source_extent(problem))


def operand_names(problem: Problem, arguments: Arguments) -> dict[fx.Node, str]:
    """Add what the elementwise operators read to `arguments`; returns the parameter names."""
    extents = extents_of(problem)
    return {node: arguments.tensor(node, strides, extents) for node, strides in problem.operands.items()}


def _ring_bytes(elements: int, element: Element) -> int:
    """Bytes of scratch, rounded up to a cache line, and a gap: buffers are not to start at equal page offsets."""
    return ceil_div(elements * element.size_bytes, LINE_BYTES) * LINE_BYTES + 3 * LINE_BYTES


def lower_concatenation(
    region: fx.GraphModule,
    strides: Sequence[Strides | None],
    result_strides: Strides,
    tiling: RowTiling,
    lanes: int,
    build: Build = build_function,
    copies: Callable[[Problem], Problem] = lambda problem: problem,
) -> LoweredKernel:
    """The kernel that copies the inputs of `region`, a single concatenation, next to each other.

    `strides` are those of the placeholders; None for one that its producer has already written into its place.
    `copies` may change the loop nest of each copy.
    """
    cat = ops.Cat.of(computations(region)[0])
    given = dict(zip(placeholders(region), strides, strict=True))
    arguments = Arguments(region, lanes)
    pieces: list[tuple[Problem, str, int]] = []
    start = 0
    for node in cat.inputs:
        own = given[node] if node in given else tuple(ops.strides(node))
        if own is not None:
            problem = copies(copy_problem(node, own, result_strides))
            name = arguments.tensor(node, problem.operands[node], extents_of(problem))
            pieces.append((problem, name, start * result_strides[cat.dim]))
        start += ops.shape(node)[cat.dim]
    out = arguments.result(ops.shape(result(region)), result_strides)

    def body(frame: Frame) -> None:
        for problem, name, offset in pieces:
            (node,) = problem.operands
            source = Operand(frame.buffers[name], problem.operands[node])
            target = Operand(frame.buffers[out], problem.result, offset)
            copy = Sink(node, Expression((), {node: source}), target)
            stage_maker(problem, tiling, arguments)(frame, source, copy).emit(frame)

    return finish(arguments, build(arguments.parameters, body))


def finish(arguments: Arguments, anonymous: Expr) -> LoweredKernel:
    """The kernel of a function, under a name that is made of its structure."""
    name = f"sepc_{tvm_ffi.structural_hash(anonymous) & 0xFFFFFFFFFFFFFFFF:016x}"
    return LoweredKernel(name, anonymous.with_attr("global_symbol", name), tuple(arguments.values))


def _source_extent(problem: Problem) -> tuple[Strides, tuple[int, ...]]:
    """Strides and extents of the anchor's input."""
    stage = problem.stage
    if isinstance(stage, Interleaved) and problem.input is not None:
        batch, channels, *pixels = ops.shape(problem.input)
        return problem.source, (batch, *(1,) * (2 - len(pixels)), *pixels, channels)
    if isinstance(stage, Convolution | Pooling):
        planes = (stage.depth.in_planes,) if stage.depth else ()
        return problem.source, (stage.batch, *planes, stage.in_height, stage.in_width, stage.in_channels)
    return problem.source, extents_of(problem)
