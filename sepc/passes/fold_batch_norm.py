"""Fold inference batch normalisation, and per-channel scales and shifts, into neighbouring weights.

Pattern: a chain of affine steps along one channel dimension, s·x + t (`sepc.passes.affine`), next to a convolution or
linear with weight W, bias b. In float64,

    before the chain:  s·(W∗x + b) + t = (s·W)∗x + (s·b + t)                s, t per output channel
    after the chain:   W∗(s·x + t) + b = (W·s)∗x + (b + Σ W·t)              s, t per input channel

Preconditions. Before: the convolution, transposed or not, or linear (or permutes between it and the chain) has no other
user, its weights are constants, and the chain varies along its output channels. After: the convolution (not transposed)
or linear is the chain's only user, and pads with no zeros unless t = 0, since padding comes after the normalisation.
The folded values are finite.

    conv2d → batch_norm → relu        becomes    conv2d' → relu
    batch_norm → conv2d               becomes    conv2d'
    relu → batch_norm → relu          becomes    relu → mul → add → relu, with constants of shape [C, 1, 1]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from sepc.ir.layers import BatchNorm, Conv, ConvTranspose, Linear
from sepc.ir.ops import Permute, aten, constant, is_constant, shape
from sepc.ir.types import fake_mode
from sepc.passes.affine import Affine, build_affine, continues, read_chain, read_step
from sepc.passes.manager import PassContext
from sepc.passes.rewriter import Rejection, Rewriter, replace

if TYPE_CHECKING:
    from torch import fx


Layer = Conv | ConvTranspose | Linear


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
            elif step is not None and not continues(node, step, graph_module):
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
            context.note(self.name, node, "folded into the weights before it", taken=True)
            return True
        after = fold_after(node, chain, build)
        if after is None:
            context.note(self.name, node, "folded into the weights after it", taken=True)
            return True
        is_norm = any(BatchNorm.matches(one) for one in chain.nodes)
        if is_norm or before.near or after.near:
            context.note(self.name, node, f"{before.reason}; {after.reason}")
        if not is_norm and len(chain.nodes) <= chain.is_scaled + chain.is_shifted:
            return False
        if replace(node, build, lambda: build_affine(chain, build)) is not None:
            return False
        context.note(self.name, node, build.description, taken=True)
        return True


def fold_before(node: fx.Node, chain: Affine, build: Rewriter) -> Rejection | None:
    """Fold `chain`, which ends at `node`, into the convolution or linear before it."""
    producer, dim, permutes = chain.input, chain.dim, list[Permute]()
    while Permute.matches(producer) and len(producer.users) == 1:
        permutes.insert(0, Permute.of(producer))
        dim = None if dim is None else permutes[0].dims[dim]
        producer = permutes[0].input
    kind = next((kind for kind in (Conv, ConvTranspose, Linear) if kind.matches(producer)), None)
    if kind is None:
        return Rejection(f"{producer.name} before it is no convolution or linear", near=False)
    layer: Layer = kind.of(producer)
    if len(producer.users) > 1:
        return Rejection(f"{producer.name} has {len(producer.users)} users")
    if not is_constant(layer.weight) or not (layer.bias is None or is_constant(layer.bias)):
        return Rejection(f"the weights of {producer.name} are computed at run time")
    channel = len(shape(producer)) - 1 if isinstance(layer, Linear) else 1
    if dim not in (None, channel):
        return Rejection(f"it varies along dimension {dim} of {producer.name}, whose channels are dimension {channel}")
    weight, bias = _weights(build, layer)
    scale = chain.scale.expand(shape(producer)[channel])
    weight = _scale_outputs(weight, scale, layer)
    bias = (chain.shift if bias is None else bias * scale + chain.shift).expand(scale.shape)

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
    if isinstance(layer, Conv) and any(layer.padding) and chain.is_shifted:
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


def _scale_outputs(weight: torch.Tensor, scale: torch.Tensor, layer: Layer) -> torch.Tensor:
    """`weight` of `layer` with each output channel times its entry of `scale`."""
    if not isinstance(layer, ConvTranspose):
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    # [G, I/G, O/G, taps] against [G, 1, O/G, 1]
    grouped = weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel())
    return (grouped * scale.reshape(layer.groups, 1, -1, 1)).reshape(weight.shape)


def _weights(build: Rewriter, layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = constant(build.graph_module, layer.weight).double()
    return weight, None if layer.bias is None else constant(build.graph_module, layer.bias).double()


def build_layer(build: Rewriter, layer: Layer, source: fx.Node, weight: torch.Tensor, bias: torch.Tensor) -> fx.Node:
    """`layer` of `source` with other weights; a new bias of zeros is left out."""
    stem = str(layer.weight.target).removesuffix("_folded")
    weight_node = build.constant(f"{stem}_folded", weight.float())
    bias_node = None
    if layer.bias is not None or bool((bias != 0).any()):
        bias_node = build.constant(f"{stem.removesuffix('_weight')}_bias_folded", bias.float().contiguous())
    if isinstance(layer, Linear):
        return build.call(aten.linear.default, source, weight_node, bias_node)
    if isinstance(layer, ConvTranspose):
        spatial = (list(layer.stride), list(layer.padding), list(layer.output_padding))
        target = ConvTranspose.targets[len(layer.stride) - 1]
        return build.call(target, source, weight_node, bias_node, *spatial, layer.groups, list(layer.dilation))
    options = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
    return build.call(Conv.targets[len(layer.stride) - 1], source, weight_node, bias_node, *options)
