"""From a stage, as numbers, with its tiling to its emitter; constants are packed into the order of reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from sepc.backends.arguments import THREAD_GAP_ELEMENTS, Arguments
from sepc.backends.sink import Sink, is_transposed
from sepc.backends.stages import dense, lanewise
from sepc.backends.stages.chain import RowStage
from sepc.backends.stages.group_normalization import (
    GroupNormalizationStage,
    StatisticsStage,
    partial_elements,
    thread_elements,
)
from sepc.backends.stages.interleaved import InterleavedStage, interleaving
from sepc.backends.stages.kernel import Frame
from sepc.backends.stages.mapping import MappingStage
from sepc.backends.stages.normalization import NormalizationStage
from sepc.backends.stages.pooling import PoolingStage
from sepc.backends.stages.product import ProductStage, Scratch
from sepc.backends.stages.softmax import SoftmaxStage
from sepc.backends.stages.strassen import StrassenStage
from sepc.backends.stages.vector import FloatArray, Operand
from sepc.backends.stages.winograd import WinogradStage
from sepc.cost_model.tiling import (
    DenseTiling,
    InterleavedTiling,
    LaneTiling,
    ProductTiling,
    RowTiling,
    StrassenTiling,
    Tiling,
)
from sepc.errors import VerificationError
from sepc.ir import layers
from sepc.ir.convolution import Convolution
from sepc.ir.element import FLOAT32
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Interleaved
from sepc.ir.problem import Problem
from sepc.ir.stage import Map, Normalization, Pooling, Softmax

# Makes a stage in a frame, given the operand that it reads (elementwise stages do not) and where its results go.
StageMaker = Callable[[Frame, Operand, Sink], RowStage]


def stage_maker(problem: Problem, tiling: Tiling, arguments: Arguments, turn_rows: int = 1) -> StageMaker:
    """What makes the problem's stage; adds the constants that it reads to `arguments`.

    In a chain the stage computes about `turn_rows` rows at a time.
    """
    anchor, stage, lanes = problem.anchor, problem.stage, arguments.lanes(problem.stage.element)
    if isinstance(stage, Map) and anchor is None and isinstance(tiling, RowTiling):
        transposes = any(is_transposed(strides) for strides in problem.operands.values()) and len(stage.extents) > 1
        return lambda frame, read, sink: MappingStage(
            stage, tiling, lanes, sink.compute, sink.compute_tile if transposes else None
        )
    if isinstance(stage, Convolution) and anchor is not None:
        return _convolution_maker(problem, anchor, stage, tiling, arguments, turn_rows)
    if isinstance(stage, Interleaved) and anchor is not None and isinstance(tiling, InterleavedTiling):
        return _interleaved_maker(anchor, stage, tiling, arguments)
    if isinstance(stage, Pooling) and isinstance(tiling, LaneTiling):
        return lambda frame, read, sink: PoolingStage(stage, tiling, lanes, read, sink.finish, frame.share)
    if isinstance(stage, Normalization) and anchor is not None and isinstance(tiling, RowTiling):
        return _normalization_maker(anchor, stage, tiling, arguments)
    if isinstance(stage, GroupNormalization) and anchor is not None and isinstance(tiling, RowTiling):
        return _group_normalization_maker(anchor, stage, tiling, arguments)
    raise _misfit(stage, tiling)


def _misfit(stage: object, tiling: Tiling) -> VerificationError:
    why = f"{type(tiling).__name__} for {type(stage).__name__}"
    return VerificationError("A tiling does not fit its stage", why=why)


def _convolution_maker(
    problem: Problem, anchor: fx.Node, conv: Convolution, tiling: Tiling, arguments: Arguments, turn_rows: int
) -> StageMaker:
    """A convolution, a linear layer or a product of two tensors."""
    match tiling:
        case DenseTiling() if problem.factor is not None:
            return _factors_maker(problem, problem.factor, conv, tiling, arguments)
        case DenseTiling() | LaneTiling():
            return _plain_maker(anchor, conv, tiling, arguments, turn_rows)
        case ProductTiling():
            return _product_maker(problem, anchor, conv, tiling, arguments)
    raise _misfit(conv, tiling)


def _plain_maker(
    anchor: fx.Node, conv: Convolution, tiling: DenseTiling | LaneTiling, arguments: Arguments, turn_rows: int
) -> StageMaker:
    """Pack the constants of the convolution `anchor`, and add them to `arguments`."""
    packed = _packed(weight_of(anchor, conv, arguments), conv, tiling, arguments)
    name, bias = arguments.constant("weight", packed), _bias(anchor, arguments)
    lanes = arguments.lanes(conv.element)

    def make(frame: Frame, read: Operand, sink: Sink) -> RowStage:
        weights, biases = frame.buffers[name], frame.buffers.get(bias)
        if isinstance(tiling, LaneTiling):
            return lanewise.LanewiseStage(conv, tiling, lanes, read, weights, biases, sink.finish)
        fetched = sink.fetched(tiling.fetched)
        return dense.DenseStage(conv, tiling, read, weights, biases, sink.finish, frame.one, turn_rows, fetched)

    return make


def _packed(
    weight: FloatArray, conv: Convolution, tiling: DenseTiling | LaneTiling, arguments: Arguments
) -> FloatArray:
    """`weight` in the order in which the kernel reads it."""
    if isinstance(tiling, LaneTiling):
        return lanewise.pack_weights(weight, conv, arguments.lanes(conv.element))
    return dense.pack_weights(weight, conv, tiling.panel)


def _interleaved_maker(
    anchor: fx.Node, stage: Interleaved, tiling: InterleavedTiling, arguments: Arguments
) -> StageMaker:
    """Pack the constants of every phase of the transposed convolution `anchor`, and add them to `arguments`."""
    layer = layers.ConvTranspose.of(anchor)
    whole, blocks = arguments.array(layer.weight), tuple(zip(stage.phases, tiling.phases, strict=True))
    names = [
        arguments.constant("weight", _packed(phase.weight(whole), phase.convolution, block, arguments))
        for phase, block in blocks
    ]
    bias = _bias(anchor, arguments)

    def make(frame: Frame, read: Operand, sink: Sink) -> RowStage:
        biases, stages = frame.buffers.get(bias), list[RowStage]()
        for (phase, block), name in zip(blocks, names, strict=True):
            conv, weights, finish = phase.convolution, frame.buffers[name], interleaving(stage, phase, sink.finish)
            if isinstance(block, LaneTiling):
                stages.append(
                    lanewise.LanewiseStage(conv, block, arguments.lanes(conv.element), read, weights, biases, finish)
                )
            else:
                stages.append(dense.DenseStage(conv, block, read, weights, biases, finish, frame.one))
        return InterleavedStage(stages)

    return make


def _normalization_maker(anchor: fx.Node, stage: Normalization, tiling: RowTiling, arguments: Arguments) -> StageMaker:
    """The same for a layer or RMS normalisation or a softmax."""
    lanes = arguments.lanes(stage.element)
    if isinstance(stage, Softmax):
        return lambda frame, read, sink: SoftmaxStage(stage, tiling, lanes, read, sink.finish, frame.share)
    if layers.RMSNorm.matches(anchor):
        weight, bias = layers.RMSNorm.of(anchor).weight, None
    else:
        weight, bias = layers.LayerNorm.of(anchor).weight, layers.LayerNorm.of(anchor).bias
    gain, shift = _optional("gain", weight, arguments), _optional("shift", bias, arguments)
    return lambda frame, read, sink: NormalizationStage(
        stage, tiling, lanes, read, sink.finish, frame.share, frame.buffers.get(gain), frame.buffers.get(shift)
    )


def _optional(kind: str, node: fx.Node | None, arguments: Arguments) -> str:
    """Add the constant `node` to `arguments`; returns its parameter name, empty where there is none."""
    return "" if node is None else arguments.constant(kind, arguments.array(node))


def _group_normalization_maker(
    anchor: fx.Node, stage: GroupNormalization, tiling: RowTiling, arguments: Arguments
) -> StageMaker:
    """The same for the second phase of a group normalisation, which reads what the first one found from scratch."""
    norm = layers.GroupNorm.of(anchor)
    gain, shift = _optional("gain", norm.weight, arguments), _optional("shift", norm.bias, arguments)
    name, own = _group_scratch(stage, tiling, arguments), thread_elements(stage)
    lanes = arguments.lanes(stage.element)

    def make(frame: Frame, read: Operand, sink: Sink) -> RowStage:
        scratch, parameters = frame.buffers[name], (frame.buffers.get(gain), frame.buffers.get(shift))
        start = partial_elements(stage, tiling) + frame.thread * (own + THREAD_GAP_ELEMENTS)
        merged = Operand(scratch, (own // 2, 1), start)
        return GroupNormalizationStage(stage, tiling, lanes, read, scratch, merged, *parameters, sink.finish)

    return make


def statistics_maker(
    problem: Problem, tiling: Tiling, arguments: Arguments
) -> Callable[[Frame, Operand], StatisticsStage]:
    """What makes the first phase of a group normalisation, given the operand that it reads."""
    stage = problem.stage
    if not isinstance(stage, GroupNormalization) or not isinstance(tiling, RowTiling):
        raise _misfit(stage, tiling)
    name, lanes = _group_scratch(stage, tiling, arguments), arguments.lanes(stage.element)
    return lambda frame, read: StatisticsStage(stage, tiling, lanes, read, frame.buffers[name])


def _group_scratch(stage: GroupNormalization, tiling: RowTiling, arguments: Arguments) -> str:
    """Add the scratch that both phases of a group normalisation share to `arguments`; returns its parameter name."""
    per_thread = thread_elements(stage) + THREAD_GAP_ELEMENTS
    size = FLOAT32.size_bytes  # Statistics are float32, whatever they are of.
    return arguments.scratch(per_thread * size, partial_elements(stage, tiling) * size)


def _factors_maker(
    problem: Problem, factor: fx.Node, stage: Convolution, tiling: DenseTiling, arguments: Arguments
) -> StageMaker:
    """The same for a product of two tensors, the right one of which is read where it lies."""
    extents = (stage.batch, stage.out_height, stage.in_channels, stage.out_channels)
    name = arguments.tensor(factor, problem.factor_strides, extents)

    def make(frame: Frame, read: Operand, sink: Sink) -> RowStage:
        right = Operand(frame.buffers[name], problem.factor_strides)
        return dense.DenseStage(stage, tiling, read, None, None, sink.finish, frame.one, factor=right)

    return make


def _product_maker(
    problem: Problem, anchor: fx.Node, conv: Convolution, tiling: ProductTiling, arguments: Arguments
) -> StageMaker:
    """The same for an algorithm of several products, which also needs scratch."""
    algorithm: type[ProductStage[Any]] = StrassenStage if isinstance(tiling, StrassenTiling) else WinogradStage
    packed = algorithm.pack_weights(weight_of(anchor, conv, arguments), conv, tiling)
    name, bias = arguments.constant("weight", packed), _bias(anchor, arguments)
    per_thread = algorithm.scratch_elements(conv, tiling) + THREAD_GAP_ELEMENTS
    scratch = arguments.scratch(per_thread * conv.element.size_bytes)

    def make(frame: Frame, read: Operand, sink: Sink) -> RowStage:
        weights, biases = frame.buffers[name], frame.buffers.get(bias)
        memory = Scratch(frame.buffers[scratch], frame.thread * per_thread)
        operands = (read, weights, biases, sink.finish, memory)
        return algorithm(conv, tiling, arguments.lanes(conv.element), *operands, problem.epilogue_cost)

    return make


def weight_of(anchor: fx.Node, conv: Convolution, arguments: Arguments) -> FloatArray:
    """The weights of the convolution or linear layer `anchor`: [O, I/groups, KH, KW]."""
    accessor = layers.Linear.of(anchor) if layers.Linear.matches(anchor) else layers.Conv.of(anchor)
    array = arguments.array(accessor.weight)
    return array.reshape(*array.shape[:2], conv.kernel_rows, conv.kernel[1])


def _bias(anchor: fx.Node, arguments: Arguments) -> str:
    """Add the bias of `anchor` to `arguments`; returns its parameter name, empty where there is none."""
    bias = bias_of(anchor, arguments)
    return "" if bias is None else arguments.constant("bias", bias)


def bias_of(anchor: fx.Node, arguments: Arguments) -> FloatArray | None:
    """The bias of the convolution or linear layer `anchor`, if it has one."""
    accessors = (layers.Linear, layers.Conv, layers.ConvTranspose)
    accessor = next(accessor for accessor in accessors if accessor.matches(anchor)).of(anchor)
    return None if accessor.bias is None else arguments.array(accessor.bias)
