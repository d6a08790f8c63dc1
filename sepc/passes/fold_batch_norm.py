"""Fold inference batch normalisation, and per-channel scales and shifts, into neighbouring weights.

Pattern: a chain of affine steps, each with one user, along one channel dimension: ``batch_norm`` with constant
statistics, or add, sub, mul, div by a number or by a constant that varies along one dimension only. In float64,

    batch_norm(x) = s·x + t    with  s = γ / √(σ² + ε),  t = β - μ·s        (per channel)
    s₂·(s₁·x + t₁) + t₂ = (s₂s₁)·x + (s₂t₁ + t₂)

so a chain is one pair (s, t), and for a convolution or linear with weight W, bias b:

    before the chain:  s·(W∗x + b) + t = (s·W)∗x + (s·b + t)                s, t per output channel
    after the chain:   W∗(s·x + t) + b = (W·s)∗x + (b + Σ W·t)              s, t per input channel

Preconditions. Before: the convolution or linear (or permutes between it and the chain) has no other user, its weights
are constants, and the chain varies along its output channels. After: it is the chain's only user, and pads with no
zeros unless t = 0, since padding comes after the normalisation. The folded values are finite.

    conv2d → batch_norm → relu        becomes    conv2d' → relu
    batch_norm → conv2d               becomes    conv2d'
    relu → batch_norm → relu          becomes    relu → mul → add → relu, with constants of shape [C, 1, 1]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from sepc.ir.ops import BatchNorm, Binary, Conv, Linear, Permute, aten, constant, dtype, is_constant, shape
from sepc.passes.manager import PassContext, Rejection, Rewriter, fake_mode, replace

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True)
class Affine:
    """``scale * input + shift`` in float64: vectors along dimension `dim`, or numbers where `dim` is None."""

    input: fx.Node
    dim: int | None
    scale: torch.Tensor
    shift: torch.Tensor
    nodes: tuple[fx.Node, ...]

    def after(self, first: Affine) -> Affine:
        """This step applied to the result of `first`."""
        dim = self.dim if self.dim is not None else first.dim
        shift = self.scale * first.shift + self.shift
        return Affine(first.input, dim, self.scale * first.scale, shift, (*first.nodes, *self.nodes))


@dataclass(frozen=True)
class FoldBatchNorm:
    """The pass. What cannot be folded into weights becomes at most one mul and one add; the note says why."""

    name: ClassVar[str] = "fold-batch-norm"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Fold every chain of `graph_module`; returns whether it changed."""
        changed, mode = False, fake_mode(graph_module)
        for node in list(graph_module.graph.nodes):
            step = read_step(node, graph_module)
            if isinstance(step, Rejection):
                context.note(self.name, node, step.reason)
            elif step is not None and not _continues(node, step, graph_module):
                chain = read_chain(step, graph_module)
                build = Rewriter(graph_module, self.name, mode, node, chain.nodes)
                changed |= self._fold(node, chain, build, context)
        return changed

    def _fold(self, node: fx.Node, chain: Affine, build: Rewriter, context: PassContext) -> bool:
        if not (chain.scale.isfinite().all() and chain.shift.isfinite().all()):
            context.note(self.name, node, "its scale or shift is not finite")
            return False
        before = fold_before(node, chain, build)
        if before is None:
            return True
        after = fold_after(node, chain, build)
        if after is None:
            return True
        is_norm = any(BatchNorm.matches(one) for one in chain.nodes)
        if is_norm or before.near or after.near:
            context.note(self.name, node, f"{before.reason}; {after.reason}")
        if not is_norm and len(chain.nodes) <= _is_scaled(chain) + _is_shifted(chain):
            return False
        return replace(node, build, lambda: build_affine(chain, build)) is None


def read_step(node: fx.Node, module: fx.GraphModule) -> Affine | Rejection | None:
    """`node` as one affine step; None if it is none, a rejection if it is a batch norm with computed statistics."""
    return _read_norm(node, module) if BatchNorm.matches(node) else _read_binary(node, module)


def _read_norm(node: fx.Node, module: fx.GraphModule) -> Affine | Rejection:
    norm = BatchNorm.of(node)
    parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if not all(one is None or is_constant(one) for one in parameters):
        return Rejection("its statistics or parameters are computed at run time")
    mean, variance = (constant(module, one).double() for one in (norm.running_mean, norm.running_var))
    weight, bias = (0.0 if one is None else constant(module, one).double() for one in (norm.weight, norm.bias))
    scale = torch.rsqrt(variance + norm.eps) * (1.0 if norm.weight is None else weight)
    return Affine(norm.input, 1, scale, bias - mean * scale, (node,))


def _read_binary(node: fx.Node, module: fx.GraphModule) -> Affine | None:
    if not Binary.matches(node) or dtype(node) != torch.float32 or is_constant(Binary.of(node).input):
        return None
    binary = Binary.of(node)
    if shape(binary.input) != shape(node) or dtype(binary.input) != torch.float32:
        return None
    found = _operand(binary.other, module, len(shape(node)))
    if found is None:
        return None
    dim, value = found
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if binary.kind in ("mul", "div"):
        return Affine(binary.input, dim, value if binary.kind == "mul" else one / value, zero, (node,))
    sign = binary.alpha if binary.kind == "add" else -binary.alpha
    return Affine(binary.input, dim, one, sign * value, (node,))


def _operand(other: fx.Node | int | float, module: fx.GraphModule, rank: int) -> tuple[int | None, torch.Tensor] | None:
    """A constant operand as (dimension of the result along which it varies, its values); None for any other operand."""
    if isinstance(other, int | float):
        return None, torch.tensor(float(other), dtype=torch.float64)
    sizes = shape(other)
    varying = [dim for dim, size in enumerate(sizes) if size > 1]
    if not is_constant(other) or len(varying) > 1:
        return None
    value = constant(module, other).double()
    return (varying[0] + rank - len(sizes), value.flatten()) if varying else (None, value.reshape(()))


def _compatible(first: Affine, second: Affine) -> bool:
    return first.dim is None or second.dim is None or first.dim == second.dim


def _continues(node: fx.Node, step: Affine, module: fx.GraphModule) -> bool:
    """Whether the only user of `node` is a step that the chain goes on with."""
    if len(node.users) != 1:
        return False
    following = read_step(next(iter(node.users)), module)
    return isinstance(following, Affine) and following.input is node and _compatible(step, following)


def read_chain(last: Affine, module: fx.GraphModule) -> Affine:
    """The longest chain that ends with step `last`."""
    chain = last
    while len(chain.input.users) == 1:
        step = read_step(chain.input, module)
        if not isinstance(step, Affine) or not _compatible(step, chain):
            break
        chain = chain.after(step)
    return chain


def _is_scaled(chain: Affine) -> bool:
    return bool((chain.scale != 1).any())


def _is_shifted(chain: Affine) -> bool:
    return bool((chain.shift != 0).any())


def fold_before(node: fx.Node, chain: Affine, build: Rewriter) -> Rejection | None:
    """Fold `chain`, which ends at `node`, into the convolution or linear before it."""
    producer, dim, permutes = chain.input, chain.dim, list[Permute]()
    while Permute.matches(producer) and len(producer.users) == 1:
        permutes.insert(0, Permute.of(producer))
        dim = None if dim is None else permutes[0].dims[dim]
        producer = permutes[0].input
    if not (Conv.matches(producer) or Linear.matches(producer)):
        return Rejection(f"{producer.name} before it is no convolution or linear", near=False)
    layer = Conv.of(producer) if Conv.matches(producer) else Linear.of(producer)
    if len(producer.users) > 1:
        return Rejection(f"{producer.name} has {len(producer.users)} users")
    if not is_constant(layer.weight) or not (layer.bias is None or is_constant(layer.bias)):
        return Rejection(f"the weights of {producer.name} are computed at run time")
    channel = 1 if Conv.matches(producer) else len(shape(producer)) - 1
    if dim not in (None, channel):
        return Rejection(f"it varies along dimension {dim} of {producer.name}, whose channels are dimension {channel}")
    weight, bias = _weights(build, layer)
    scale = chain.scale.expand(weight.shape[0])
    weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    bias = (chain.shift if bias is None else bias * scale + chain.shift).expand(weight.shape[0])

    def rewrite() -> fx.Node:
        result = build_layer(build, layer, layer.input, weight, bias)
        for permute in permutes:
            result = build.call(aten.permute.default, result, list(permute.dims))
        return result

    return replace(node, build, rewrite)


def fold_after(node: fx.Node, chain: Affine, build: Rewriter) -> Rejection | None:
    """Fold `chain`, which ends at `node`, into the convolution or linear after it."""
    if len(node.users) != 1:
        return Rejection(f"it has {len(node.users)} users", near=False)
    consumer = next(iter(node.users))
    layer = Conv.of(consumer) if Conv.matches(consumer) else Linear.of(consumer) if Linear.matches(consumer) else None
    if layer is None or layer.input is not node:
        return Rejection(f"{consumer.name} after it is no convolution or linear of it", near=False)
    if not is_constant(layer.weight) or not (layer.bias is None or is_constant(layer.bias)):
        return Rejection(f"the weights of {consumer.name} are computed at run time")
    channel = 1 if isinstance(layer, Conv) else len(shape(node)) - 1
    if chain.dim not in (None, channel):
        return Rejection(f"it varies along dimension {chain.dim}, and {consumer.name} sums over dimension {channel}")
    if isinstance(layer, Conv) and any(layer.padding) and _is_shifted(chain):
        return Rejection(f"{consumer.name} pads with zeros after the shift")
    weight, bias = _weights(build, layer)
    groups = layer.groups if isinstance(layer, Conv) else 1
    # [G, O/G, I/G, taps] against [G, 1, I/G, 1]
    grouped = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    scale, shift = (
        one.expand(groups * weight.shape[1]).reshape(groups, 1, -1, 1) for one in (chain.scale, chain.shift)
    )
    more = (grouped * shift).sum((2, 3)).flatten()
    weight, bias = (grouped * scale).reshape(weight.shape), more if bias is None else bias + more
    build = Rewriter(build.graph_module, build.pass_name, build.mode, consumer, (*chain.nodes, consumer))
    return replace(consumer, build, lambda: build_layer(build, layer, chain.input, weight, bias))


def _weights(build: Rewriter, layer: Conv | Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = constant(build.graph_module, layer.weight).double()
    return weight, None if layer.bias is None else constant(build.graph_module, layer.bias).double()


def build_layer(
    build: Rewriter, layer: Conv | Linear, source: fx.Node, weight: torch.Tensor, bias: torch.Tensor
) -> fx.Node:
    """`layer` of `source` with other weights; a new bias of zeros is left out."""
    stem = str(layer.weight.target).removesuffix("_folded")
    weight_node = build.constant(f"{stem}_folded", weight.float())
    bias_node = None
    if layer.bias is not None or bool((bias != 0).any()):
        bias_node = build.constant(f"{stem.removesuffix('_weight')}_bias_folded", bias.float().contiguous())
    if isinstance(layer, Linear):
        return build.call(aten.linear.default, source, weight_node, bias_node)
    options = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
    return build.call(Conv.targets[len(layer.stride) - 1], source, weight_node, bias_node, *options)


def build_affine(chain: Affine, build: Rewriter) -> fx.Node:
    """`chain` as a mul and an add, each only if needed; constants of shape [C, 1, …] align with `chain.dim`."""
    result = chain.input
    steps = ((aten.mul.Tensor, chain.scale, _is_scaled(chain)), (aten.add.Tensor, chain.shift, _is_shifted(chain)))
    for target, value, needed in steps:
        if needed and chain.dim is None:
            result = build.call(target, result, float(value))
        elif needed:
            trailing = len(shape(chain.input)) - 1 - (chain.dim or 0)
            hint = f"{build.anchor.name}_{'scale' if target is aten.mul.Tensor else 'shift'}"
            result = build.call(target, result, build.constant(hint, value.float().reshape(-1, *[1] * trailing)))
    return result
