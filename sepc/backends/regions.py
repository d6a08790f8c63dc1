"""From a region with its tiling to a kernel: its stage is emitted with its elementwise operators as the sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm_ffi
from numpy.typing import NDArray
from torch import fx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages import dense, lanewise, strassen
from sepc.backends.stages.chain import ChainStage, RowStage
from sepc.backends.stages.elementwise import Expression
from sepc.backends.stages.kernel import Frame, Parameter, build_function
from sepc.backends.stages.mapping import MappingStage
from sepc.backends.stages.normalization import NormalizationStage
from sepc.backends.stages.pooling import PoolingStage
from sepc.backends.stages.row_means import RowMeans
from sepc.backends.stages.softmax import SoftmaxStage
from sepc.backends.stages.vector import Expr, Index, Operand, Ring, lanes_of
from sepc.cost_model.tiling import ChainTiling, DenseTiling, LaneTiling, RowTiling, StrassenTiling, Tiling
from sepc.errors import VerificationError
from sepc.ir import ops
from sepc.ir.layout import storage_elements
from sepc.ir.links import chain_of
from sepc.ir.problem import Problem, Strides, copy_problem
from sepc.ir.region import computations, placeholders, result
from sepc.ir.stage import Convolution, Map, Normalization, Pooling, Softmax, ceil_div

FloatArray = NDArray[np.float32]


FLOAT_BYTES = 4
LINE_ELEMENTS = 16
# Between the scratch of two threads, a page and a bit: with less, prefetching by one disturbs the other. Measured on 2
# Zen 5 cores, 1×1 16→96, depthwise stride 2, 1×1 96→24 at 112²: 194 µs without, 158 µs with.
THREAD_GAP_ELEMENTS = 1024 + 3 * LINE_ELEMENTS


@dataclass(frozen=True)
class Scratch:
    """Memory that a kernel needs while it runs, for each thread."""

    bytes_per_thread: int


@dataclass(frozen=True)
class Result:
    """What a kernel writes: the region's result, or the means of it over each row."""

    position: int = 0


# What a kernel's pointer is: a placeholder's index, an array of constants, scratch, or a result.
Argument = int | FloatArray | Scratch | Result


@dataclass(frozen=True)
class LoweredKernel:
    """A kernel and what its pointer parameters are.

    Attributes:
        name: symbol of the kernel; equal for equal kernels.
        function: tirx PrimFunc with raw C calling convention.
        arguments: what each pointer is, in order.
    """

    name: str
    function: Expr
    arguments: tuple[Argument, ...]


class _Arguments:
    """Collects the pointer parameters of a kernel."""

    def __init__(self, region: fx.GraphModule, lanes: int) -> None:
        self.lanes = lanes
        self._region = region
        self._index = {node: index for index, node in enumerate(placeholders(region))}
        self.parameters: list[Parameter] = []
        self.values: list[Argument] = []

    def constant(self, kind: str, array: FloatArray) -> str:
        """Add an array of constants of that kind; returns its parameter name."""
        self.parameters.append(Parameter(f"{kind}_{len(self.values)}", array.size))
        self.values.append(np.ascontiguousarray(array))
        return self.parameters[-1].name

    def tensor(self, node: fx.Node, strides: Strides, extents: Sequence[int]) -> str:
        """Add a tensor that the region reads, an input or a constant; returns its parameter name."""
        if node.op == "get_attr":
            return self.constant("constant", self.array(node).ravel())
        self.parameters.append(Parameter(f"in_{len(self.values)}", storage_elements(extents, strides)))
        self.values.append(self._index[node])
        return self.parameters[-1].name

    def result(self, extents: Sequence[int], strides: Strides, position: int = 0) -> str:
        """Add the pointer to a result of the region, if there is one; returns its parameter name, else nothing."""
        if not strides:
            return ""
        self.parameters.append(Parameter(f"out_{position}", storage_elements(extents, strides)))
        self.values.append(Result(position))
        return self.parameters[-1].name

    def scratch(self, elements_per_thread: int) -> str:
        """Add a pointer to memory of each thread's own, one piece after the other; returns its parameter name."""
        # How many threads there are is known at the call only; the size of the buffer does not matter to the code.
        self.parameters.append(Parameter("scratch", elements_per_thread))
        self.values.append(Scratch(elements_per_thread * FLOAT_BYTES))
        return "scratch"

    def array(self, node: fx.Node) -> FloatArray:
        """The values of a constant of the region."""
        return ops.constant(self._region, node).detach().contiguous().numpy()


def lower(region: fx.GraphModule, problem: Problem, tiling: Tiling, lanes: int) -> LoweredKernel:
    """The kernel of `region`, whose loop nest is `problem`, with vectors of `lanes` channels."""
    arguments = _Arguments(region, lanes)
    source = _source(problem, arguments)
    make = _stage_maker(problem, tiling, arguments)
    names = _operand_names(problem, arguments)
    out = arguments.result(_extents(problem), problem.result)
    means = arguments.result(_extents(problem), problem.row_means, 1)

    def body(frame: Frame) -> None:
        read = Operand(frame.buffers.get(source), problem.source)
        write = Operand(frame.buffers[out], problem.result)
        make(frame, read, _sink(problem, frame, names, write, means)).emit(frame)

    return _finish(arguments, body)


def lower_chain(region: fx.GraphModule, problems: Sequence[Problem], tiling: ChainTiling, lanes: int) -> LoweredKernel:
    """The kernel of `region`, a chain whose links have loop nests `problems`; it needs scratch for each thread."""
    arguments = _Arguments(region, lanes)
    first, last = problems[0], problems[-1]
    source = _source(first, arguments)
    chain = chain_of(problems)
    turn_rows = chain.rows_for(tiling.step)
    makers = [
        _stage_maker(problem, block, arguments, rows)
        for problem, block, rows in zip(problems, tiling.links, turn_rows, strict=True)
    ]
    names = [_operand_names(problem, arguments) for problem in problems]
    out = arguments.result(_extents(last), last.result)
    means = arguments.result(_extents(last), last.row_means, 1)
    rings = chain.ring_elements(tiling.step)
    starts = [sum(map(_aligned_elements, rings[:index])) for index in range(len(rings) + 1)]
    per_thread = starts[-1] + THREAD_GAP_ELEMENTS
    scratch = arguments.scratch(per_thread)

    def body(frame: Frame) -> None:
        base = frame.thread * per_thread
        between = [
            Ring(frame.buffers[scratch], problem.result, base + start, rows=rows)
            for problem, start, rows in zip(problems, starts, turn_rows[:-1], strict=False)
        ]
        reads = [Operand(frame.buffers.get(source), first.source), *between]
        writes = [*between, Operand(frame.buffers[out], last.result)]
        stages = [
            make(frame, read, _sink(problem, frame, own, write, means if problem is last else ""))
            for problem, make, read, write, own in zip(problems, makers, reads, writes, names, strict=True)
        ]
        ChainStage(chain, stages, tiling.rows, tiling.step).emit(frame)

    return _finish(arguments, body)


def _source(problem: Problem, arguments: _Arguments) -> str:
    """Add the anchor's input to `arguments`; returns its parameter name, empty where there is no anchor."""
    return "" if problem.input is None else arguments.tensor(problem.input, *_source_extent(problem))


def _operand_names(problem: Problem, arguments: _Arguments) -> dict[fx.Node, str]:
    """Add what the elementwise operators read to `arguments`; returns the parameter names."""
    extents = _extents(problem)
    return {node: arguments.tensor(node, strides, extents) for node, strides in problem.operands.items()}


def _aligned_elements(elements: int) -> int:
    """`elements` of scratch, rounded up to a cache line, and a gap: buffers are not to start at equal page offsets."""
    return ceil_div(elements, LINE_ELEMENTS) * LINE_ELEMENTS + 3 * LINE_ELEMENTS


def lower_concatenation(
    region: fx.GraphModule, strides: Sequence[Strides | None], result_strides: Strides, tiling: RowTiling, lanes: int
) -> LoweredKernel:
    """The kernel that copies the inputs of `region`, a single concatenation, next to each other.

    `strides` are those of the placeholders; None for one that its producer has already written into its place.
    """
    cat = ops.Cat.of(computations(region)[0])
    given = dict(zip(placeholders(region), strides, strict=True))
    arguments = _Arguments(region, lanes)
    pieces: list[tuple[Problem, str, int]] = []
    start = 0
    for node in cat.inputs:
        own = given[node] if node in given else tuple(ops.strides(node))
        if own is not None:
            problem = copy_problem(node, own, result_strides)
            name = arguments.tensor(node, problem.operands[node], _extents(problem))
            pieces.append((problem, name, start * result_strides[cat.dim]))
        start += ops.shape(node)[cat.dim]
    out = arguments.result(ops.shape(result(region)), result_strides)

    def body(frame: Frame) -> None:
        for problem, name, offset in pieces:
            (node,) = problem.operands
            source = Operand(frame.buffers[name], problem.operands[node])
            target = Operand(frame.buffers[out], problem.result, offset)
            copy = _Sink(node, Expression((), {node: source}), target)
            _stage_maker(problem, tiling, arguments)(frame, source, copy).emit(frame)

    return _finish(arguments, body)


def _finish(arguments: _Arguments, body: Callable[[Frame], None]) -> LoweredKernel:
    """Build the function, under a name that is made of its structure."""
    anonymous = build_function("kernel", arguments.parameters, body)
    name = f"sepc_{tvm_ffi.structural_hash(anonymous) & 0xFFFFFFFFFFFFFFFF:016x}"
    return LoweredKernel(name, anonymous.with_attr("global_symbol", name), tuple(arguments.values))


def _extents(problem: Problem) -> tuple[int, ...]:
    """Extents of the iteration space."""
    stage = problem.stage
    if isinstance(stage, Convolution):
        return stage.batch, stage.out_height, stage.out_width, stage.out_channels
    if isinstance(stage, Pooling):
        return stage.batch, stage.out_height, stage.out_width, stage.channels
    return stage.extents


def _source_extent(problem: Problem) -> tuple[Strides, tuple[int, ...]]:
    """Strides and extents of the anchor's input."""
    stage = problem.stage
    if isinstance(stage, Convolution):
        return problem.source, (stage.batch, stage.in_height, stage.in_width, stage.in_channels)
    if isinstance(stage, Pooling):
        return problem.source, (stage.batch, stage.in_height, stage.in_width, stage.channels)
    return problem.source, _extents(problem)


# Makes a stage in a frame, given the operand that it reads (elementwise stages do not) and where its results go.
_StageMaker = Callable[[Frame, Operand, "_Sink"], RowStage]


def _stage_maker(problem: Problem, tiling: Tiling, arguments: _Arguments, turn_rows: int = 1) -> _StageMaker:
    """What makes the problem's stage; adds the constants that it reads to `arguments`.

    In a chain the stage computes about `turn_rows` rows at a time.
    """
    anchor, stage, lanes = problem.anchor, problem.stage, arguments.lanes
    if isinstance(stage, Map) and anchor is None and isinstance(tiling, RowTiling):
        return lambda frame, read, sink: MappingStage(stage, tiling, lanes, sink.compute)
    if isinstance(stage, Convolution) and problem.factor is not None and isinstance(tiling, DenseTiling):
        return _factors_maker(problem, problem.factor, stage, tiling, arguments)
    if isinstance(stage, Convolution) and anchor is not None and isinstance(tiling, DenseTiling | LaneTiling):
        return _convolution_maker(anchor, stage, tiling, arguments, turn_rows)
    if isinstance(stage, Convolution) and anchor is not None and isinstance(tiling, StrassenTiling):
        return _product_maker(anchor, stage, tiling, arguments, problem.epilogue_cost)
    if isinstance(stage, Pooling) and isinstance(tiling, LaneTiling):
        return lambda frame, read, sink: PoolingStage(stage, tiling, lanes, read, sink.finish)
    if isinstance(stage, Normalization) and anchor is not None and isinstance(tiling, RowTiling):
        return _normalization_maker(anchor, stage, tiling, arguments)
    raise VerificationError(
        "A tiling does not fit its stage", why=f"{type(tiling).__name__} for {type(stage).__name__}"
    )


def _convolution_maker(
    anchor: fx.Node, conv: Convolution, tiling: DenseTiling | LaneTiling, arguments: _Arguments, turn_rows: int
) -> _StageMaker:
    """Pack the constants of the convolution `anchor`, and add them to `arguments`."""
    if isinstance(tiling, LaneTiling):
        packed = lanewise.pack_weights(_weight(anchor, conv, arguments), conv, arguments.lanes)
    else:
        packed = dense.pack_weights(_weight(anchor, conv, arguments), conv, tiling.panel)
    name, bias = arguments.constant("weight", packed), _bias(anchor, arguments)

    def make(frame: Frame, read: Operand, sink: _Sink) -> RowStage:
        weights, biases = frame.buffers[name], frame.buffers.get(bias)
        if isinstance(tiling, LaneTiling):
            return lanewise.LanewiseStage(conv, tiling, arguments.lanes, read, weights, biases, sink.finish)
        return dense.DenseStage(conv, tiling, read, weights, biases, sink.finish, turn_rows)

    return make


def _normalization_maker(
    anchor: fx.Node, stage: Normalization, tiling: RowTiling, arguments: _Arguments
) -> _StageMaker:
    """The same for a layer normalisation or a softmax."""
    lanes = arguments.lanes
    if isinstance(stage, Softmax):
        return lambda frame, read, sink: SoftmaxStage(stage, tiling, lanes, read, sink.finish)
    norm = ops.LayerNorm.of(anchor)
    gain = arguments.constant("gain", arguments.array(norm.weight)) if norm.weight is not None else ""
    shift = arguments.constant("shift", arguments.array(norm.bias)) if norm.bias is not None else ""
    return lambda frame, read, sink: NormalizationStage(
        stage, tiling, lanes, read, sink.finish, frame.buffers.get(gain), frame.buffers.get(shift)
    )


def _factors_maker(
    problem: Problem, factor: fx.Node, stage: Convolution, tiling: DenseTiling, arguments: _Arguments
) -> _StageMaker:
    """The same for a product of two tensors, the right one of which is read where it lies."""
    extents = (stage.batch, stage.out_height, stage.in_channels, stage.out_channels)
    name = arguments.tensor(factor, problem.factor_strides, extents)

    def make(frame: Frame, read: Operand, sink: _Sink) -> RowStage:
        right = Operand(frame.buffers[name], problem.factor_strides)
        return dense.DenseStage(stage, tiling, read, None, None, sink.finish, factor=right)

    return make


def _product_maker(
    anchor: fx.Node, conv: Convolution, tiling: StrassenTiling, arguments: _Arguments, epilogue_cost: int
) -> _StageMaker:
    """The same for a matrix product of halves, which also needs scratch."""
    packed = strassen.pack_weights(_weight(anchor, conv, arguments), conv, tiling.half.panel)
    name, bias = arguments.constant("weight", packed), _bias(anchor, arguments)
    per_thread = strassen.scratch_elements(conv, tiling) + THREAD_GAP_ELEMENTS
    scratch = arguments.scratch(per_thread)

    def make(frame: Frame, read: Operand, sink: _Sink) -> RowStage:
        weights, biases = frame.buffers[name], frame.buffers.get(bias)
        memory = strassen.Scratch(frame.buffers[scratch], frame.thread * per_thread)
        return strassen.StrassenStage(
            conv, tiling, arguments.lanes, read, weights, biases, sink.finish, memory, epilogue_cost
        )

    return make


def _weight(anchor: fx.Node, conv: Convolution, arguments: _Arguments) -> FloatArray:
    """The weights of the convolution or linear layer `anchor`: [O, I/groups, KH, KW]."""
    accessor = ops.Linear.of(anchor) if ops.Linear.matches(anchor) else ops.Conv.of(anchor)
    array = arguments.array(accessor.weight)
    return array.reshape(*array.shape[:2], *conv.kernel)


def _bias(anchor: fx.Node, arguments: _Arguments) -> str:
    """Add the bias of `anchor` to `arguments`; returns its parameter name, empty where there is none."""
    accessor = ops.Linear.of(anchor) if ops.Linear.matches(anchor) else ops.Conv.of(anchor)
    return "" if accessor.bias is None else arguments.constant("bias", arguments.array(accessor.bias))


def _sink(problem: Problem, frame: Frame, names: Mapping[fx.Node, str], write: Operand, means: str) -> _Sink:
    """What becomes of the results of the problem's stage in a frame; `means`: the parameter for the row means."""
    operands = {node: Operand(frame.buffers[names[node]], strides) for node, strides in problem.operands.items()}
    sums = RowMeans(Operand(frame.buffers[means], problem.row_means), _extents(problem)[2]) if means else None
    return _Sink(problem.anchor, Expression(problem.epilogue, operands), write, sums)


@dataclass(frozen=True)
class _Sink:
    """Evaluates the elementwise operators that follow a stage, and stores what comes out."""

    anchor: fx.Node | None
    expression: Expression
    write: Operand
    means: RowMeans | None = None

    def finish(self, position: Sequence[Index], value: Expr) -> None:
        """Take a finished vector of the anchor at `position`."""
        values = {self.anchor: value} if self.anchor is not None else {}
        result = T.Bind(self.expression(values, position, lanes_of(value)))
        self.write.store(position, result)
        if self.means is not None:
            self.means.add(position, result)

    def compute(self, position: Sequence[Index], lanes: int) -> None:
        """Compute `lanes` elements at `position` from operands alone."""
        self.write.store(position, self.expression({}, position, lanes))
