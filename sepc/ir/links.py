"""From a region of several stages, a chain, to the loop nest of each: its links.

Every link iterates over (batch, row, column, channel) of an image, however its operators order the dimensions: tensors
of convolutions and poolings are [N, C, H, W], those of linear layers and normalisations [N, H, W, C], and a permute
between the two only relabels. A link is an anchor (convolution, pooling, linear layer, layer normalisation) with the
elementwise operators up to the next one; a chain may also begin with elementwise operators alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from torch import fx

from sepc.ir import layers, ops
from sepc.ir.anchors import UnsupportedRegionError, anchor_space, channel_axes, unpadded
from sepc.ir.convolution import Convolution
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Interleaved
from sepc.ir.problem import Problem, Strides, operand_strides, spread_strides
from sepc.ir.region import computations, returned, row_means
from sepc.ir.stage import Chain, Map, Normalization, Pooling, Stage

RANK: Final = 4
CHANNELS_SECOND: Final = channel_axes(RANK)
CHANNELS_LAST: Final = (0, 1, 2, 3)

Axes = tuple[int, ...]


def is_anchor(node: fx.Node) -> bool:
    """Whether a link can hang on `node`."""
    return any(
        accessor.matches(node)
        for accessor in (layers.Conv, layers.Pool, layers.Linear, layers.LayerNorm, layers.RMSNorm)
    )


def image_axes(anchor: fx.Node) -> Axes:
    """Which of (batch, row, column, channel) each dimension of the anchor's input, and of its result, runs along."""
    return CHANNELS_SECOND if layers.Conv.matches(anchor) or layers.Pool.matches(anchor) else CHANNELS_LAST


def links_of(region: fx.GraphModule) -> list[tuple[fx.Node | None, tuple[fx.Node, ...]]]:
    """The anchors of a chain, each with the elementwise operators and permutes up to the next one.

    There is no anchor where the chain begins elementwise.
    """
    links: list[tuple[fx.Node | None, tuple[fx.Node, ...]]] = []
    for node in computations(region):
        if is_anchor(node):
            links.append((node, ()))
        elif not ops.Pad.matches(node) and node is not row_means(region):
            anchor, epilogue = links.pop() if links else (None, ())
            links.append((anchor, (*epilogue, node)))
    return links


def analyse_chain(
    region: fx.GraphModule, strides: Mapping[fx.Node, Strides], *result_strides: Strides
) -> tuple[Problem, ...]:
    """The loop nests of a region that is a chain, one per link, over (batch, row, column, channel).

    Between two links lies a ring buffer of rows, dense but for the number of rows; otherwise as
    `sepc.ir.problem.analyse`. Raises UnsupportedRegionError where a link takes the dimensions of the value before it
    for others than they are.
    """
    problems: list[Problem] = []
    links = links_of(region)
    for index, (anchor, epilogue) in enumerate(links):
        following = links[index + 1][0] if index + 1 < len(links) else None
        axes, ends = _axes(anchor, epilogue, following)
        extents, stage = _space(anchor, epilogue, axes)
        operands = operand_strides(epilogue, {} if anchor is None else {anchor: axes}, axes, RANK, strides)
        written: Strides = (0, extents[2] * extents[3], extents[3], 1)
        results = [written]
        if following is None:
            results = [
                spread_strides(ends, own, ops.shape(node), RANK)
                for node, own in zip(returned(region), result_strides, strict=True)
            ]
        problem = Problem(stage, anchor, None, epilogue, (), operands, *results)
        if anchor is not None:
            tensor = unpadded(anchor.all_input_nodes[0])
            source = problems[-1].result if problems else spread_strides(axes, strides[tensor], ops.shape(tensor), RANK)
            problem = replace(problem, input=tensor, source=source)
        elif isinstance(stage, Map):
            problem = replace(problem, stage=replace(stage, operations=max(1, problem.epilogue_cost)))
        problems.append(problem)
    return tuple(problems)


def chain_of(problems: Sequence[Problem]) -> Chain:
    """The stages of a chain's loop nests."""
    return Chain(tuple(problem.link for problem in problems))


def result_axes(region: fx.GraphModule) -> Axes:
    """Which of (batch, row, column, channel) each dimension of the result of a region with an anchor runs along."""
    anchor, epilogue = links_of(region)[-1]
    return _axes(anchor, epilogue, None)[1]


def chain_order(region: fx.GraphModule) -> tuple[int, ...]:
    """In which order, outermost first, the dimensions of a chain's result lie in memory: channels innermost."""
    return tuple(sorted(range(RANK), key=result_axes(region).__getitem__))


def fits(region: fx.GraphModule, permutes: Sequence[fx.Node], anchor: fx.Node) -> bool:
    """Whether `anchor` takes the result of `region`, after `permutes`, for the image that it is."""
    last, epilogue = links_of(region)[-1]
    try:
        _axes(last, (*epilogue, *permutes), anchor)
    except UnsupportedRegionError:
        return False
    return True


def _axes(anchor: fx.Node | None, epilogue: Sequence[fx.Node], following: fx.Node | None) -> tuple[Axes, Axes]:
    """The axes of a link's first value, and of its last, which must be those that the `following` anchor expects."""
    starts = (CHANNELS_SECOND, CHANNELS_LAST) if anchor is None else (image_axes(anchor),)
    for start in starts:
        end = _permuted(start, epilogue)
        if following is None or end == image_axes(following):
            return start, end
    raise UnsupportedRegionError(f"{following} takes the channels of the value before it for another dimension")


def _permuted(axes: Axes, nodes: Sequence[fx.Node]) -> Axes:
    for node in nodes:
        if ops.Permute.matches(node):
            axes = tuple(axes[dim] for dim in ops.Permute.of(node).dims)
    return axes


def _space(anchor: fx.Node | None, epilogue: Sequence[fx.Node], axes: Axes) -> tuple[tuple[int, ...], Stage]:
    """Extents (batch, row, column, channel) of a link, and its stage."""
    shape = ops.shape(epilogue[0] if anchor is None else anchor)
    if len(shape) != RANK:
        raise UnsupportedRegionError(f"{anchor} gives no image with rows")
    extents = tuple(shape[axes.index(axis)] for axis in range(RANK))
    if anchor is None:
        return extents, Map(extents, element=ops.element(epilogue[0]))
    _, _, stage = anchor_space(anchor, elementwise=False)
    batch, height, width, channels = extents
    if layers.Linear.matches(anchor):
        inputs = ops.shape(layers.Linear.of(anchor).weight)[1]
        return extents, Convolution(batch, height, width, height, width, inputs, channels, element=ops.element(anchor))
    if isinstance(stage, Normalization):
        return extents, replace(stage, extents=(batch, height, width, channels))
    if isinstance(stage, Pooling) and stage.adaptive:
        raise UnsupportedRegionError(f"{anchor} has windows of its own for every row")
    if isinstance(stage, Interleaved | GroupNormalization):
        raise UnsupportedRegionError(f"{anchor} is no link of a chain")
    return extents, stage
