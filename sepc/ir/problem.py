"""From a region and the strides of its tensors to a loop nest: what the cost model costs and the backends emit.

Every region of ours iterates over the elements of its result. The iteration space has the dimensions (batch, row,
column, channel) for stages with channels (with planes after the batch if they are 3-D), and as many as needed for
elementwise regions; each tensor is an array of
strides over it. Dimensions along which all tensors advance alike are merged, so that a pointwise convolution or linear
layer sees one long row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from sepc.ir import layers, ops
from sepc.ir.anchors import UnsupportedRegionError, anchor_of, anchor_space, channel_axes, unpadded
from sepc.ir.convolution import Convolution, Mixing
from sepc.ir.element import Element
from sepc.ir.elementwise import OPERATIONS, instructions
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Interleaved
from sepc.ir.region import result, returned
from sepc.ir.stage import Map, Normalization, Stage

Strides = tuple[int, ...]
ROW_MEANS_COST = 2
"""Vector instructions per vector of results that adding to the means over its row takes."""


@dataclass(frozen=True)
class Problem:
    """A region as a loop nest.

    Attributes:
        stage: what is computed, over the merged iteration space.
        anchor: the node that the stage stands for; None for elementwise regions.
        input: the tensor that the anchor reads (before zero padding that the stage takes over); None without anchor.
        epilogue: elementwise and permute nodes after the anchor, in order.
        source: strides of the anchor's input over (batch, row, column, channel); empty without anchor.
        operands: strides over the iteration space of every other tensor that the region reads elementwise.
        result: strides of the region's result over the iteration space.
        row_means: strides over it of the means of the result over each row; empty where there are none.
        factor: the right factor of a product of two tensors, which stands where a convolution has its weights.
        factor_strides: its strides over (batch, row, input channel, output channel).
    """

    stage: Stage | Interleaved | GroupNormalization
    anchor: fx.Node | None
    input: fx.Node | None
    epilogue: tuple[fx.Node, ...]
    source: Strides
    operands: Mapping[fx.Node, Strides]
    result: Strides
    row_means: Strides = ()
    factor: fx.Node | None = field(default=None, kw_only=True)
    factor_strides: Strides = field(default=(), kw_only=True)

    @property
    def link(self) -> Stage:
        """The stage, as one that can be computed a few rows at a time; raises UnsupportedRegionError if it cannot."""
        if isinstance(self.stage, Interleaved):
            raise UnsupportedRegionError("a transposed convolution is no link of a chain")
        if isinstance(self.stage, GroupNormalization):
            raise UnsupportedRegionError("a normalisation over pixels is no link of a chain")
        return self.stage

    @property
    def mixing(self) -> Mixing:
        """What may be mixed: pixels of one image, of several only those of a tile, and none that are gathered in means,
        which takes whole rows in order.
        """
        if self.anchor is None or self.row_means or self.factor is not None:
            return "nothing"
        return "pixels" if ops.shape(self.anchor)[0] == 1 else "tiles"

    @property
    def result_element(self) -> Element:
        """The type of what it computes, after the epilogue."""
        last = self.epilogue[-1] if self.epilogue else self.anchor or next(iter(self.operands))
        return ops.element(last)

    @property
    def operand_bytes(self) -> int:
        """Bytes of the tensors that are read elementwise."""
        return sum(map(ops.size_bytes, self.operands))

    @property
    def epilogue_cost(self) -> int:
        """Vector instructions per vector of results that the epilogue takes."""
        return sum(map(instructions, self.epilogue)) + (ROW_MEANS_COST if self.row_means else 0)


def contiguous_strides(shape: Sequence[int], order: Sequence[int] | None = None) -> Strides:
    """Dense strides of `shape`, its dimensions lying in memory in `order`, outermost first (else as they come)."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order if order is not None else range(len(shape))):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


def channels_last_order(rank: int) -> tuple[int, ...]:
    """Memory order of dimensions with dimension 1 innermost."""
    return (0, *range(2, rank), 1)


def analyse(region: fx.GraphModule, strides: Mapping[fx.Node, Strides], *result_strides: Strides) -> Problem:
    """The loop nest of `region`, given the strides of its placeholders (by node), of its result and of its row means.

    Raises UnsupportedRegionError with the reason where no stage covers it.
    """
    first, epilogue = anchor_of(region)
    anchor = None if first.target in OPERATIONS else first
    extents, axes, stage = anchor_space(first, anchor is None)
    all_axes = {anchor: axes} if anchor is not None else {}
    operands = operand_strides(epilogue, all_axes, axes, len(extents), strides)
    final_axes = all_axes.get(result(region), axes)
    written = [
        spread_strides(final_axes, own, ops.shape(node), len(extents))
        for node, own in zip(returned(region), result_strides, strict=True)
    ]
    tensor = None if anchor is None else unpadded(anchor.all_input_nodes[0])
    if anchor is not None and layers.Product.matches(anchor):
        return product_problem(anchor, epilogue, strides, operands, written)
    source = () if tensor is None else _source(anchor, tensor, stage, strides)
    problem = Problem(stage, anchor, tensor, epilogue, source, operands, *written)
    return _merge(problem, extents)


def product_problem(
    anchor: fx.Node,
    epilogue: tuple[fx.Node, ...],
    strides: Mapping[fx.Node, Strides],
    operands: Mapping[fx.Node, Strides],
    written: Sequence[Strides],
) -> Problem:
    """The loop nest of a product of two tensors: a linear layer per matrix, over (batch, row, column, channel).

    `operands` and `written` are strides over the dimensions of its result. Leading dimensions along which all tensors
    advance alike are merged; batch and row can stand for two. Raises UnsupportedRegionError where there remain more.
    """
    product, shape = layers.Product.of(anchor), ops.shape(anchor)
    rank = len(shape)

    def spread(tensor: fx.Node) -> Strides:
        own, sizes = strides_of(tensor, strides), ops.shape(tensor)
        leading = (0 if size == 1 else stride for size, stride in zip(sizes[:-2], own[:-2], strict=True))
        return (0,) * (rank - len(sizes)) + (*leading, *own[-2:])

    left, right = spread(product.left), spread(product.right)
    tensors = [left, right, *written, *operands.values()]
    merged, rows = _collapse(shape[:-2], [tensor[:-2] for tensor in tensors])
    if len(merged) > 2:
        raise UnsupportedRegionError("its factors advance differently along too many dimensions")
    batch, height = (*merged, 1, 1)[:2]
    space = [(*row, 0, 0)[:2] + tensor[-2:] for row, tensor in zip(rows, tensors, strict=True)]
    inner = ops.shape(product.left)[-1]
    pixels = (batch, height, shape[-2], height, shape[-2])
    stage = Convolution(*pixels, inner, shape[-1], element=ops.element(anchor))
    results, others = space[2 : 2 + len(written)], space[2 + len(written) :]
    own_operands = dict(zip(operands, others, strict=True))
    problem = Problem(stage, anchor, product.left, epilogue, space[0], own_operands, *results)
    return replace(problem, factor=product.right, factor_strides=space[1])


def strides_of(node: fx.Node, strides: Mapping[fx.Node, Strides]) -> Strides:
    """The strides of what a region reads: as given, or as constants are stored."""
    return contiguous_strides(ops.shape(node)) if node.op == "get_attr" else strides[node]


def copy_problem(value: fx.Node, source_strides: Strides, result_strides: Strides) -> Problem:
    """The loop nest that copies `value` from one layout to another."""
    shape = ops.shape(value)
    spread = [
        spread_strides(range(len(shape)), strides, shape, len(shape)) for strides in (source_strides, result_strides)
    ]
    return _merge(
        Problem(Map(shape, element=ops.element(value)), None, None, (), (), {value: spread[0]}, spread[1]), shape
    )


def result_order(region: fx.GraphModule, strides: Mapping[fx.Node, Strides]) -> tuple[int, ...]:
    """In which order, outermost first, the dimensions of the region's result should lie in memory.

    Stages with channels write channels innermost; an elementwise region keeps the order of the first operand that has
    the full shape. `strides` are those of the region's placeholders. Raises UnsupportedRegionError as `analyse` does.
    """
    first, epilogue = anchor_of(region)
    elementwise = first.target in OPERATIONS
    extents, axes, _ = anchor_space(first, elementwise)
    all_axes = {} if elementwise else {first: axes}
    operands = operand_strides(epilogue, all_axes, axes, len(extents), strides)
    along: Sequence[int] = range(len(extents))
    if elementwise:
        sizes = [dim for dim, extent in enumerate(extents) if extent != 1]
        full = [o for node, o in operands.items() if node.op == "placeholder" and all(o[dim] for dim in sizes)]
        if full:
            along = sorted(along, key=lambda dim: full[0][dim], reverse=True)
    place = {dim: index for index, dim in enumerate(along)}
    final = all_axes.get(result(region), axes)
    if layers.Product.matches(first) and final[-1] == len(extents) - 1:
        return tuple(range(len(final)))  # Vectors are stored along the last dimension; the others may lie as they like.
    return tuple(sorted(range(len(final)), key=lambda dim: place[final[dim]]))


def spread_strides(axes: Sequence[int], strides: Sequence[int], shape: Sequence[int], rank: int) -> Strides:
    """Strides over an iteration space of `rank` dimensions of a tensor whose dimension d runs along `axes[d]`."""
    spread = [0] * rank
    offset = len(axes) - len(shape)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        if size != 1:
            spread[axes[offset + dim]] = stride
    return tuple(spread)


def operand_strides(
    epilogue: Sequence[fx.Node],
    all_axes: dict[fx.Node, tuple[int, ...]],
    axes: tuple[int, ...],
    rank: int,
    strides: Mapping[fx.Node, Strides],
) -> dict[fx.Node, Strides]:
    """Strides over the iteration space of the tensors that `epilogue` reads; also records the axes of its nodes."""
    operands: dict[fx.Node, Strides] = {}
    for node in epilogue:
        inputs = node.all_input_nodes
        known = next((all_axes[argument] for argument in inputs if argument in all_axes), axes)
        if ops.Permute.matches(node):
            all_axes[node] = tuple(known[dim] for dim in ops.Permute.of(node).dims)
            continue
        all_axes[node] = known
        for argument in inputs:
            if argument in all_axes:
                continue
            shape = ops.shape(argument)
            own = strides_of(argument, strides)
            spread = spread_strides(known, own, shape, rank)
            if operands.setdefault(argument, spread) != spread:
                raise UnsupportedRegionError(f"{argument.name} is read in two different orders")
    return operands


def _source(
    anchor: fx.Node | None,
    tensor: fx.Node,
    stage: Stage | Interleaved | GroupNormalization,
    strides: Mapping[fx.Node, Strides],
) -> Strides:
    """Strides of the anchor's input `tensor` over its own dimensions, in the order of the iteration space."""
    shape, own = ops.shape(tensor), strides[tensor]
    if isinstance(stage, Normalization) or (anchor is not None and layers.Linear.matches(anchor)):
        return own
    return spread_strides(channel_axes(len(shape)), own, shape, max(4, len(shape)))


def _merge(problem: Problem, extents: Sequence[int]) -> Problem:
    """Merge iteration dimensions along which all tensors advance alike, as far as the stage allows."""
    stage = problem.stage
    if isinstance(stage, Map):
        return _merge_all(problem, extents)
    if isinstance(stage, Normalization) or (isinstance(stage, Convolution) and _is_pointwise(stage)):
        return _merge_pixels(problem, extents[:-1])
    if isinstance(stage, GroupNormalization):
        return _merge_within_images(problem, stage)
    return problem


def _merge_all(problem: Problem, extents: Sequence[int]) -> Problem:
    """Merge the dimensions of an elementwise problem, in the order in which its result lies in memory."""
    order = [dim for dim in range(len(extents)) if extents[dim] != 1]
    order.sort(key=lambda dim: problem.result[dim], reverse=True)
    tensors = [problem.result, *problem.operands.values()]
    merged, rows = _collapse([extents[d] for d in order], [tuple(t[d] for d in order) for t in tensors])
    if not merged:
        merged, rows = [1], [(1,) for _ in tensors]
    operands = dict(zip(problem.operands, rows[1:], strict=True))
    stage = Map(tuple(merged), max(1, problem.epilogue_cost), problem.stage.element)
    return replace(problem, stage=stage, operands=operands, result=rows[0])


def _merge_pixels(problem: Problem, pixels: Sequence[int]) -> Problem:
    """Merge the dimensions before the channels of a stage that treats every pixel alike; pad them to three."""
    stage = problem.stage
    tensors = [problem.result, *problem.operands.values(), problem.source]
    merged, rows = _collapse(pixels, [strides[:-1] for strides in tensors])
    if len(merged) > 3 and not isinstance(stage, Normalization):
        raise UnsupportedRegionError("its tensors advance differently along too many dimensions")
    padding = max(0, 3 - len(merged))
    leading = (1,) * padding + tuple(merged)
    spread = [(0,) * padding + row + (strides[-1],) for row, strides in zip(rows, tensors, strict=True)]
    if isinstance(stage, Normalization):
        stage = replace(stage, extents=(*leading, stage.channels))
    if isinstance(stage, Convolution):
        batch, height, width = leading
        stage = replace(stage, batch=batch, in_height=height, out_height=height, in_width=width, out_width=width)
        stage = replace(stage, depth=None)
    operands = dict(zip(problem.operands, spread[1:-1], strict=True))
    return replace(problem, stage=stage, source=spread[-1], operands=operands, result=spread[0])


def _merge_within_images(problem: Problem, stage: GroupNormalization) -> Problem:
    """Merge the dimensions between the images and the channels."""
    tensors = [problem.result, *problem.operands.values(), problem.source]
    merged, rows = _collapse(stage.extents[1:-1], [strides[1:-1] for strides in tensors])
    result, *operands, source = ((own[0], *row, own[-1]) for own, row in zip(tensors, rows, strict=True))
    stage = replace(stage, extents=(stage.images, *merged, stage.channels))
    named = dict(zip(problem.operands, operands, strict=True))
    return replace(problem, stage=stage, source=source, operands=named, result=result)


def _is_pointwise(stage: Convolution) -> bool:
    in_place = stage.depth is None or (stage.depth.stride == 1 and stage.depth.padding == 0)
    return stage.taps == 1 and stage.stride == (1, 1) and stage.padding == (0, 0) and in_place


def _collapse(extents: Sequence[int], tensors: Sequence[Strides]) -> tuple[list[int], list[Strides]]:
    """Merge dimensions (a, b) next to each other where all tensors have stride_a = stride_b · extent_b; drop size 1."""
    merged: list[int] = []
    rows: list[list[int]] = [[] for _ in tensors]
    for dim, extent in enumerate(extents):
        if extent == 1:
            continue
        steps = [tensor[dim] for tensor in tensors]
        if merged and all(row[-1] == step * extent for row, step in zip(rows, steps, strict=True)):
            merged[-1] *= extent
            for row, step in zip(rows, steps, strict=True):
                row[-1] = step
        else:
            merged.append(extent)
            for row, step in zip(rows, steps, strict=True):
                row.append(step)
    return merged, [tuple(row) for row in rows]
