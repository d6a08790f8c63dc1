"""From a region with its tiling to a kernel: its stage is emitted with its elementwise operators as the sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm_ffi
from numpy.typing import NDArray
from torch import fx

from sepc.backends.stages import dense, lanewise
from sepc.backends.stages.elementwise import Expression
from sepc.backends.stages.kernel import Frame, Parameter, build_function
from sepc.backends.stages.mapping import MappingStage
from sepc.backends.stages.normalization import NormalizationStage
from sepc.backends.stages.pooling import PoolingStage
from sepc.backends.stages.vector import Expr, Index, Operand, lanes_of
from sepc.cost_model.tiling import DenseTiling, LaneTiling, RowTiling, Tiling
from sepc.errors import VerificationError
from sepc.ir import ops
from sepc.ir.layout import storage_elements
from sepc.ir.problem import Problem, Strides, copy_problem
from sepc.ir.region import computations, placeholders, result
from sepc.ir.stage import Convolution, Normalization, Pooling

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class LoweredKernel:
    """A kernel and what its pointer parameters are, in order.

    Attributes:
        name: symbol of the kernel; equal for equal kernels.
        function: tirx PrimFunc with raw C calling convention.
        arguments: per pointer the index of the region's placeholder, an array of constants, or None for the result.
    """

    name: str
    function: Expr
    arguments: tuple[int | FloatArray | None, ...]


class _Arguments:
    """Collects the pointer parameters of a kernel."""

    def __init__(self, region: fx.GraphModule) -> None:
        self._region = region
        self._index = {node: index for index, node in enumerate(placeholders(region))}
        self.parameters: list[Parameter] = []
        self.values: list[int | FloatArray | None] = []

    def constant(self, name: str, array: FloatArray) -> str:
        """Add an array of constants; returns its parameter name."""
        self.parameters.append(Parameter(name, array.size))
        self.values.append(np.ascontiguousarray(array))
        return name

    def tensor(self, node: fx.Node, strides: Strides, extents: Sequence[int]) -> str:
        """Add a tensor that the region reads, an input or a constant; returns its parameter name."""
        if node.op == "get_attr":
            return self.constant(f"constant_{len(self.values)}", self.array(node).ravel())
        self.parameters.append(Parameter(f"in_{len(self.values)}", storage_elements(extents, strides)))
        self.values.append(self._index[node])
        return self.parameters[-1].name

    def result(self, elements: int) -> str:
        """Add the pointer to the region's result; returns its parameter name."""
        self.parameters.append(Parameter("out", elements))
        self.values.append(None)
        return "out"

    def array(self, node: fx.Node) -> FloatArray:
        """The values of a constant of the region."""
        return ops.constant(self._region, node).detach().contiguous().numpy()


def lower(region: fx.GraphModule, problem: Problem, tiling: Tiling, lanes: int) -> LoweredKernel:
    """The kernel of `region`, whose loop nest is `problem`, with vectors of `lanes` channels."""
    arguments = _Arguments(region)
    out_elements = storage_elements(_extents(problem), problem.result)
    source = ""
    if problem.input is not None:
        source = arguments.tensor(problem.input, *_source_extent(problem))
    emit_anchor = _anchor_emitter(problem, tiling, lanes, source, arguments)
    names = {node: arguments.tensor(node, strides, _extents(problem)) for node, strides in problem.operands.items()}
    out = arguments.result(out_elements)

    def body(frame: Frame) -> None:
        operands = {n: Operand(frame.buffers[names[n]], strides) for n, strides in problem.operands.items()}
        expression = Expression(problem.epilogue, operands)
        emit_anchor(frame, expression, Operand(frame.buffers[out], problem.result))

    return _finish(arguments, body)


def lower_concatenation(
    region: fx.GraphModule, strides: Sequence[Strides | None], result_strides: Strides, tiling: RowTiling, lanes: int
) -> LoweredKernel:
    """The kernel that copies the inputs of `region`, a single concatenation, next to each other.

    `strides` are those of the placeholders; None for one that its producer has already written into its place.
    """
    cat = ops.Cat.of(computations(region)[0])
    given = dict(zip(placeholders(region), strides, strict=True))
    arguments = _Arguments(region)
    pieces: list[tuple[Problem, str, int]] = []
    start = 0
    for node in cat.inputs:
        own = given[node] if node in given else tuple(ops.strides(node))
        if own is not None:
            problem = copy_problem(node, own, result_strides)
            name = arguments.tensor(node, problem.operands[node], _extents(problem))
            pieces.append((problem, name, start * result_strides[cat.dim]))
        start += ops.shape(node)[cat.dim]
    out = arguments.result(storage_elements(ops.shape(result(region)), result_strides))

    def body(frame: Frame) -> None:
        for problem, name, offset in pieces:
            (source_strides,) = problem.operands.values()
            source = Operand(frame.buffers[name], source_strides)
            target = Operand(frame.buffers[out], problem.result, offset)
            _map_emitter(problem, tiling, lanes, source.load)(frame, target)

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
    if isinstance(stage, Normalization):
        return 1, 1, stage.pixels, stage.channels
    return stage.extents


def _source_extent(problem: Problem) -> tuple[Strides, tuple[int, ...]]:
    """Strides and extents of the anchor's input."""
    stage = problem.stage
    if isinstance(stage, Convolution):
        return problem.source, (stage.batch, stage.in_height, stage.in_width, stage.in_channels)
    if isinstance(stage, Pooling):
        return problem.source, (stage.batch, stage.in_height, stage.in_width, stage.channels)
    return problem.source, _extents(problem)


# Emits an anchor into a frame, given the elementwise operators that follow and the result.
_Emitter = Callable[[Frame, Expression, Operand], None]


def _anchor_emitter(problem: Problem, tiling: Tiling, lanes: int, source: str, arguments: _Arguments) -> _Emitter:
    """The emitter of the problem's stage; adds the constants that it reads to `arguments`."""
    anchor, stage = problem.anchor, problem.stage

    def sink(expression: Expression, out: Operand) -> dense.Sink:
        def finish(position: Sequence[Index], value: Expr) -> None:
            values: Mapping[fx.Node, Expr] = {anchor: value} if anchor is not None else {}
            out.store(position, expression(values, position, lanes_of(value)))

        return finish

    if anchor is None and isinstance(tiling, RowTiling):

        def emit_map(frame: Frame, expression: Expression, out: Operand) -> None:
            _map_emitter(problem, tiling, lanes, lambda at, n: expression({}, at, n))(frame, out)

        return emit_map
    if isinstance(stage, Convolution):
        return _convolution_emitter(problem, stage, tiling, lanes, source, arguments, sink)
    if isinstance(stage, Pooling) and isinstance(tiling, LaneTiling):
        return lambda frame, expression, out: PoolingStage(
            stage, tiling, lanes, Operand(frame.buffers[source], problem.source), sink(expression, out)
        ).emit(frame)
    if isinstance(stage, Normalization) and isinstance(tiling, RowTiling) and anchor is not None:
        norm = ops.LayerNorm.of(anchor)
        gain = arguments.constant("gain", arguments.array(norm.weight)) if norm.weight is not None else ""
        shift = arguments.constant("shift", arguments.array(norm.bias)) if norm.bias is not None else ""
        return lambda frame, expression, out: NormalizationStage(
            stage,
            tiling,
            lanes,
            Operand(frame.buffers[source], problem.source),
            frame.buffers.get(gain),
            frame.buffers.get(shift),
            sink(expression, out),
        ).emit(frame)
    raise VerificationError(
        "A tiling does not fit its stage", why=f"{type(tiling).__name__} for {type(stage).__name__}"
    )


def _convolution_emitter(
    problem: Problem,
    stage: Convolution,
    tiling: Tiling,
    lanes: int,
    source: str,
    arguments: _Arguments,
    sink: Callable[[Expression, Operand], dense.Sink],
) -> _Emitter:
    anchor = problem.anchor
    if anchor is None:
        raise VerificationError("A convolution has an anchor")
    accessor = ops.Linear.of(anchor) if ops.Linear.matches(anchor) else ops.Conv.of(anchor)
    array = arguments.array(accessor.weight)
    weight = array.reshape(*array.shape[:2], *stage.kernel)
    if isinstance(tiling, LaneTiling):
        packed = arguments.constant("weight", lanewise.pack_weights(weight, stage, lanes))
    elif isinstance(tiling, DenseTiling):
        packed = arguments.constant("weight", dense.pack_weights(weight, stage, tiling.panel))
    bias = arguments.constant("bias", arguments.array(accessor.bias)) if accessor.bias is not None else ""

    def emit(frame: Frame, expression: Expression, out: Operand) -> None:
        read = Operand(frame.buffers[source], problem.source)
        weights, biases, finish = frame.buffers[packed], frame.buffers.get(bias), sink(expression, out)
        if isinstance(tiling, LaneTiling):
            lanewise.LanewiseStage(stage, tiling, lanes, read, weights, biases, finish).emit(frame)
        elif isinstance(tiling, DenseTiling):
            dense.DenseStage(stage, tiling, read, weights, biases, finish).emit(frame)

    return emit


def _map_emitter(
    problem: Problem, tiling: RowTiling, lanes: int, value: Callable[[Sequence[Index], int], Expr]
) -> Callable[[Frame, Operand], None]:
    """Emits ``out[position] = value(position, lanes)`` over the problem's iteration space."""
    stage = problem.stage
    if isinstance(stage, Convolution | Pooling | Normalization):
        raise VerificationError("Only an elementwise stage is mapped", why=type(stage).__name__)

    def emit(frame: Frame, out: Operand) -> None:
        MappingStage(stage, tiling, lanes, lambda at, n: out.store(at, value(at, n))).emit(frame)

    return emit
