"""Bring the graph into one spelling: same meaning, fewer kinds of nodes.

Every rule is an identity of tensors, and keeps shape, dtype and strides; a replacement that would not is rejected.

    f(constants)                                 → a constant, unless it is far larger than those
    dropout in eval, copies, identity views, ×1  → x
    relu6, hardtanh, clamp_min, clamp_max        → clamp(x, low, high); clamp(x, 0) → relu
    average pool to 1×1, mean over H and W       → mean(x, [2, 3], keepdim=True), then a view without keepdim
    reshape, flatten, squeeze, unsqueeze         → view with explicit sizes; view ∘ view → view
    transpose, t                                 → permute; permute ∘ permute → permute
    add, sub, mul, div of a number or constant   → .Tensor overload, the number or constant second
    split, split_with_sizes, chunk + getitem     → slice
    BN, layer norm, max pool of several outputs  → batch_norm, layer_norm, max_pool2d, of one output
    convolution, conv.padding="same", no batch   → conv1d/2d/3d with numbers and a batch dimension
    conv(pad(x, p zeros on both sides))          → conv(x) with padding + p

Preconditions: all shapes are static. Rejections are noted: an output that must stay a tensor of its own, padding that
is not symmetric, a view that the strides do not allow, a constant too large to fold.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.ir.ops import (
    Binary,
    Conv,
    Mean,
    Pad,
    Permute,
    Pool,
    arguments,
    aten,
    constant,
    is_constant,
    is_op,
    per_dimension,
    shape,
)
from sepc.passes.manager import PassContext, Rejection, Rewriter, Rule, fake_mode, replace, same_type

Call = tuple[OpOverload, tuple[Any, ...]]
Window = tuple[fx.Node, tuple[int, ...], tuple[int, ...]]
Spelling = Callable[[fx.Node, fx.GraphModule], Call | Rejection | None]


class DropNoOp(Rule[fx.Node]):
    """An operator that gives back its input."""

    copies = (aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default)
    # These give back their input whenever the type stays.
    by_type = (
        *(*copies, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh.default),
        *(aten.to.dtype, aten.to.dtype_layout, aten.view.default, aten._unsafe_view.default, aten.reshape.default),
        *(aten.expand.default, aten.slice.Tensor),
    )
    dropouts = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
    targets = (*by_type, *dropouts, *Permute.targets, *Pad.targets, *Binary.targets, aten.cat.default)

    def match(self, node: fx.Node, module: fx.GraphModule) -> fx.Node | Rejection | None:
        named = arguments(node)
        source = named["tensors"][0] if "tensors" in named else named.get("self", named.get("input"))
        if not isinstance(source, fx.Node) or not self._is_identity(node, source):
            return None
        if not same_type(node.meta["val"], source.meta["val"]):
            return None
        if node.target in self.copies and any(user.op == "output" for user in node.users):
            return Rejection("it is an output, which must be a tensor of its own")
        return source

    def _is_identity(self, node: fx.Node, source: fx.Node) -> bool:
        if node.target in self.dropouts:
            named = arguments(node)
            return not named["train"] or named["p"] == 0
        if Permute.matches(node):
            return Permute.of(node).dims == tuple(range(len(shape(node))))
        if Pad.matches(node):
            return not any((*Pad.of(node).before, *Pad.of(node).after))
        if Binary.matches(node):
            binary = Binary.of(node)
            neutral = 1 if binary.kind in ("mul", "div") else 0
            return isinstance(binary.other, int | float) and binary.other * binary.alpha == neutral
        return not is_op(node, aten.cat.default) or len(arguments(node)["tensors"]) == 1

    def rewrite(self, match: fx.Node, build: Rewriter) -> fx.Node:
        return match


@dataclass(frozen=True)
class Respell(Rule[Call]):
    """One call for another: `spelling` gives the other call of a node that calls one of `targets`."""

    targets: tuple[object, ...]
    spelling: Spelling

    def match(self, node: fx.Node, module: fx.GraphModule) -> Call | Rejection | None:
        return self.spelling(node, module)

    def rewrite(self, match: Call, build: Rewriter) -> fx.Node:
        target, args = match
        return build.call(target, *args)


def _as_view(node: fx.Node, module: fx.GraphModule) -> Call | None:
    source, sizes = arguments(node)["self"], list(shape(node))
    if is_op(node, aten.view.default):
        inner = is_op(source, aten.view.default)
        if not inner and list(arguments(node)["size"]) == sizes:
            return None
        source = arguments(source)["self"] if inner else source
    return aten.view.default, (source, sizes)


def _as_permute(node: fx.Node, module: fx.GraphModule) -> Call | None:
    if Permute.matches(node):
        outer = Permute.of(node)
        if not Permute.matches(outer.input):
            return None
        inner = Permute.of(outer.input)
        return aten.permute.default, (inner.input, [inner.dims[dim] for dim in outer.dims])
    named, order = arguments(node), list(range(len(shape(node))))
    first, second = named.get("dim0", 0), named.get("dim1", -1)
    if order:
        order[first], order[second] = order[second], order[first]
    return aten.permute.default, (named["self"], order)


def _as_clamp(node: fx.Node, module: fx.GraphModule) -> Call | None:
    named = arguments(node)
    low, high = named.get("min", named.get("min_val")), named.get("max", named.get("max_val"))
    if is_op(node, aten.relu6.default):
        low, high = 0, 6
    if low == 0 and high is None:
        return aten.relu.default, (named["self"],)
    return None if is_op(node, aten.clamp.default) else (aten.clamp.default, (named["self"], low, high))


def _as_binary(node: fx.Node, module: fx.GraphModule) -> Call | None:
    if not Binary.matches(node):
        kinds: dict[object, OpOverload] = dict(zip(_SCALAR_BINARY, Binary.targets, strict=True))
        named = arguments(node)
        return kinds[node.target], (named["self"], named["other"] * named.get("alpha", 1))
    binary = Binary.of(node)
    first, second, target = binary.input, binary.other, Binary.targets[Binary.position(node)]
    if not isinstance(second, fx.Node):
        return None
    if is_constant(second) and math.prod(shape(second)) == 1:
        return target, (first, constant(module, second).item() * binary.alpha)
    commutes = binary.kind == "mul" or (binary.kind == "add" and binary.alpha == 1)
    return (target, (second, first)) if commutes and is_constant(first) and not is_constant(second) else None


def _as_constant_pad(node: fx.Node, module: fx.GraphModule) -> Call | None:
    pad = Pad.of(node)
    if pad.mode != "constant":
        return None
    return aten.constant_pad_nd.default, (pad.input, arguments(node)["pad"], pad.value)


def _as_slice(node: fx.Node, module: fx.GraphModule) -> Call | None:
    split, index = node.args
    if not isinstance(split, fx.Node) or not is_op(split, *_SPLITS) or not isinstance(index, int):
        return None
    named = arguments(split)
    dim = named["dim"] % len(shape(named["self"]))
    sizes = [part.shape[dim] for part in split.meta["val"]]
    start = sum(sizes[: index % len(sizes)])
    return aten.slice.Tensor, (named["self"], dim, start, start + sizes[index])


def _as_one_output(node: fx.Node, module: fx.GraphModule) -> Call | None:
    source, index = node.args
    if index != 0 or not isinstance(source, fx.Node) or not isinstance(source.target, OpOverload):
        return None
    named = arguments(source)
    if is_op(source, aten._native_batch_norm_legit_no_training.default):
        names = ("input", "weight", "bias", "running_mean", "running_var")
        return aten.batch_norm.default, (*map(named.get, names), False, named["momentum"], named["eps"], False)
    if is_op(source, aten.native_layer_norm.default):
        return aten.layer_norm.default, tuple(map(named.get, ("input", "normalized_shape", "weight", "bias", "eps")))
    if is_op(source, aten.max_pool2d_with_indices.default):
        return aten.max_pool2d.default, tuple(named.values())
    return None


def _as_padded_conv(node: fx.Node, module: fx.GraphModule) -> Call | Rejection | None:
    conv = Conv.of(node)
    if not is_op(conv.input, aten.constant_pad_nd.default):
        return None
    pad, name = Pad.of(conv.input), conv.input.name
    if pad.value != 0:
        return Rejection(f"{name} pads with {pad.value}, a convolution with zeros")
    if any((*pad.before[:2], *pad.after[:2])):
        return Rejection(f"{name} pads batch or channels")
    if min((*pad.before, *pad.after)) < 0:
        return Rejection(f"{name} crops")
    if pad.before != pad.after:
        return Rejection(f"{name} pads {pad.before[2:]} before and {pad.after[2:]} after")
    return _conv_call(conv, pad.input, tuple(map(operator.add, conv.padding, pad.before[2:])))


class GlobalMean(Rule[Window]):
    """Average over all spatial dimensions: ``mean(x, [2, 3], keepdim=True)``, then a view to the shape it had."""

    targets = (*Pool.targets, *Mean.targets)

    def match(self, node: fx.Node, module: fx.GraphModule) -> Window | Rejection | None:
        source = Mean.of(node).input if Mean.matches(node) else Pool.of(node).input
        spatial = tuple(range(2, len(shape(source))))
        covers = self._mean_covers(node, spatial) if Mean.matches(node) else self._pool_covers(node, spatial)
        return (source, spatial, shape(node)) if covers else None

    def _mean_covers(self, node: fx.Node, spatial: tuple[int, ...]) -> bool:
        mean, named = Mean.of(node), arguments(node)
        canonical = mean.keepdim and tuple(named["dim"]) == spatial
        return len(spatial) in (1, 2) and mean.dims == spatial and named["dtype"] is None and not canonical

    def _pool_covers(self, node: fx.Node, spatial: tuple[int, ...]) -> bool:
        pool, sizes = Pool.of(node), shape(Pool.of(node).input)[2:]
        if pool.kind == "max" or len(sizes) != len(pool.output_size or pool.kernel):
            return False
        if pool.kind == "adaptive_avg":
            return all(size == 1 for size in pool.output_size)
        return pool.kernel == sizes and not any(pool.padding) and pool.divisor_override is None

    def rewrite(self, match: Window, build: Rewriter) -> fx.Node:
        source, spatial, result = match
        mean = build.call(aten.mean.dim, source, list(spatial), True)
        return mean if shape(mean) == result else build.call(aten.view.default, mean, list(result))


class NumericConv(Rule[tuple[Conv, tuple[int, ...]]]):
    """Any convolution that is not transposed as conv1d/2d/3d, with numbers for its padding and a batch dimension."""

    by_name = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
    targets = (*Conv.targets, *by_name, aten.convolution.default)

    def match(self, node: fx.Node, module: fx.GraphModule) -> tuple[Conv, tuple[int, ...]] | None:
        """The convolution, and how many zeros more it needs after each spatial dimension than before it."""
        named = arguments(node)
        kernel = shape(named["weight"])[2:]
        rank = len(kernel)
        if named.get("transposed") or (Conv.matches(node) and len(shape(node)) == rank + 2):
            return None
        stride, dilation = (per_dimension(named[name], rank) for name in ("stride", "dilation"))
        around = [0] * rank
        if named["padding"] == "same":
            around = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        elif named["padding"] != "valid":
            around = [2 * size for size in per_dimension(named["padding"], rank)]
        padding, more = tuple(size // 2 for size in around), tuple(size % 2 for size in around)
        return Conv(named["input"], named["weight"], named["bias"], stride, padding, dilation, named["groups"]), more

    def rewrite(self, match: tuple[Conv, tuple[int, ...]], build: Rewriter) -> fx.Node:
        """The convolution, after a padding if its own is not symmetric, between views if it had no batch dimension."""
        conv, more = match
        source = conv.input
        batched = len(shape(source)) == len(conv.stride) + 2
        if not batched:
            source = build.call(aten.view.default, source, [1, *shape(source)])
        if any(more):
            amounts = [amount for size in reversed(more) for amount in (0, size)]
            source = build.call(aten.constant_pad_nd.default, source, amounts, 0)
        target, args = _conv_call(conv, source, conv.padding)
        result = build.call(target, *args)
        return result if batched else build.call(aten.view.default, result, list(shape(result)[1:]))


def _conv_call(conv: Conv, source: fx.Node, padding: tuple[int, ...]) -> Call:
    options = (list(conv.stride), list(padding), list(conv.dilation), conv.groups)
    return Conv.targets[len(conv.stride) - 1], (source, conv.weight, conv.bias, *options)


_SCALAR_BINARY = (aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_CLAMPS = (
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.clamp.default,
)
_VIEWS = (
    *(aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.view.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
RULES: tuple[Rule[Any], ...] = (
    DropNoOp(),
    Respell(_VIEWS, _as_view),
    Respell((*Permute.targets, aten.transpose.int, aten.t.default), _as_permute),
    Respell(_CLAMPS, _as_clamp),
    Respell((*Binary.targets, *_SCALAR_BINARY), _as_binary),
    Respell((aten.pad.default,), _as_constant_pad),
    Respell((operator.getitem,), _as_slice),
    Respell((operator.getitem,), _as_one_output),
    GlobalMean(),
    NumericConv(),
    Respell(Conv.targets, _as_padded_conv),
)


@dataclass(frozen=True)
class Canonicalize:
    """The pass: constants are folded and rules applied until nothing changes.

    Attributes:
        fold_limit_bytes: larger constants are folded only if at most twice as large as what they are made of.
    """

    name: ClassVar[str] = "canonicalize"
    fold_limit_bytes: int = 65536

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Rewrite `graph_module` into canonical form; returns whether it changed."""
        changed = drop_assertions(graph_module.graph)
        while self._round(graph_module, context):
            graph_module.graph.eliminate_dead_code()
            changed = True
        return changed

    def _round(self, module: fx.GraphModule, context: PassContext) -> bool:
        changed = ConstantFolder(module, self.name, self.fold_limit_bytes).run(context)
        for node in list(module.graph.nodes):
            rules = (rule for rule in RULES if node.target in rule.targets)
            changed |= any(rule.apply(node, self.name, module, context) for rule in rules)
        return changed


def drop_assertions(graph: fx.Graph) -> bool:
    """Erase what has neither users nor a value: assertions and guards, all decided by static shapes."""
    calls = (node for node in graph.nodes if node.op == "call_function")
    dead = [node for node in calls if not node.users and node.meta.get("val") is None]
    for node in dead:
        graph.erase_node(node)
    return bool(dead)


class ConstantFolder:
    """Replaces by constants the nodes that depend on no input, and are read by a node that does."""

    def __init__(self, graph_module: fx.GraphModule, pass_name: str, limit_bytes: int) -> None:
        self.graph_module, self.pass_name, self.limit_bytes = graph_module, pass_name, limit_bytes
        self.values: dict[fx.Node, Any] = {}
        self.leaves: dict[fx.Node, frozenset[fx.Node]] = {}

    def run(self, context: PassContext) -> bool:
        """Fold; returns whether a node was replaced."""
        self._evaluate()
        changed = False
        wanted = {node for node in self.values if any(user not in self.values for user in node.users)}
        for node in reversed(self.values):
            if node not in wanted or node.op == "get_attr":
                continue
            rejection = self._rejection(node) or self._replace(node)
            changed |= rejection is None
            if rejection is not None:
                context.note(self.pass_name, node, rejection.reason)
                wanted.update(node.all_input_nodes)
        return changed

    def _evaluate(self) -> None:
        for node in self.graph_module.graph.nodes:
            if node.op == "get_attr":
                self.values[node], self.leaves[node] = constant(self.graph_module, node), frozenset((node,))
            elif self._is_foldable(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
                with torch.no_grad():
                    self.values[node] = node.target(*args, **kwargs)
                self.leaves[node] = frozenset().union(*(self.leaves[source] for source in node.all_input_nodes))

    def _is_foldable(self, node: fx.Node) -> bool:
        if node.op != "call_function" or not all(source in self.values for source in node.all_input_nodes):
            return False
        return not (isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags)

    def _rejection(self, node: fx.Node) -> Rejection | None:
        value = self.values[node]
        if not isinstance(value, torch.Tensor):
            return Rejection("it has several outputs")
        made_of = sum(self.values[leaf].numel() * self.values[leaf].element_size() for leaf in self.leaves[node])
        size = value.numel() * value.element_size()
        if size <= max(self.limit_bytes, 2 * made_of):
            return None
        return Rejection(f"the constant would have {size} bytes, and is made of {made_of}")

    def _replace(self, node: fx.Node) -> Rejection | None:
        build = Rewriter(self.graph_module, self.pass_name, fake_mode(self.graph_module), node, (node,))
        name, value = f"folded_{node.name}", self.values[node]
        # A copy if its strides do: the value may be a view of a larger constant, and would keep it alive.
        copied = replace(node, build, lambda: build.constant(name, value.clone()))
        return copied and replace(node, build, lambda: build.constant(name, value))
