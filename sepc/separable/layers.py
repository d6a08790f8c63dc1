"""The convolutions of a model that forms can take the place of: which module each is, and what follows it in the graph.

A module is one layer if the graph reads its weight in one convolution only. If a batch normalisation follows, its
scale says how much each output channel counts. If a sum follows, the other summand can make up for errors made earlier
on the way to it (`sepc.separable.calibrated`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import fx, nn

from sepc.ir.layers import BatchNorm, Conv
from sepc.ir.ops import Binary, constant, is_constant, shape
from sepc.separable.forms import FORMS
from sepc.separable.geometry import Geometry, Layer

# Of the median: a channel with a smaller scale counts as if it had this one, as errors are divided by it.
SMALLEST_SCALE: Final = 1e-3


@dataclass(frozen=True)
class DenseLayer:
    """A convolution that can be replaced.

    Attributes:
        path: the module's name in the model.
        node: the convolution in the graph.
        geometry: as the graph has it, where padding may be an operator of its own.
        scale: what a normalisation behind it multiplies each output channel with, [O] in float64.
        shift: what that adds then.
        result: the node that holds the result, normalised if there is a normalisation.
        skip: what is added to that result, if anything is.
    """

    path: str
    node: fx.Node
    geometry: Geometry
    scale: torch.Tensor
    shift: torch.Tensor
    result: fx.Node
    skip: fx.Node | None

    @property
    def conv(self) -> Conv:
        """The accessor of the convolution."""
        return Conv.of(self.node)

    @property
    def image_size(self) -> tuple[int, ...]:
        """Of the input, in pixels."""
        return shape(self.conv.input)[2:]


def find_layers(model: nn.Module, graph_module: fx.GraphModule) -> tuple[list[DenseLayer], dict[str, str]]:
    """The layers in the order in which they run, and for each other convolution module the reason why it is none.

    The constants of `graph_module` share memory with the parameters of `model`.
    """
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            paths.setdefault(module.weight.data_ptr(), []).append(path)
    layers: list[DenseLayer] = []
    reasons: dict[str, str] = {path: "it is not called" for own in paths.values() for path in own}
    for node in graph_module.graph.nodes:
        if not (Conv.matches(node) and is_constant(Conv.of(node).weight)):
            continue
        weight = constant(graph_module, Conv.of(node).weight)
        own = paths.get(weight.data_ptr(), [])
        if not own:
            continue
        reason = _obstacle(model, own, node)
        if reason:
            reasons.update(dict.fromkeys(own, reason))
        else:
            layers.append(_read(own[0], node, graph_module))
            del reasons[own[0]]
    return layers, reasons


def _obstacle(model: nn.Module, paths: list[str], node: fx.Node) -> str:
    """Why the convolution `node` of the modules at `paths` is no layer of ours; empty if it is."""
    module, conv = model.get_submodule(paths[0]), Conv.of(node)
    if len(paths) > 1:
        return f"its weight is shared by {', '.join(paths)}"
    if len(conv.weight.users) > 1:
        return f"it is called {len(conv.weight.users)} times"
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"it is a {type(module).__name__}, whose forward may do more than a convolution"
    if not any(form.full_rank(_geometry(conv)) for form in FORMS.values()):
        return "it is depthwise" if conv.is_depthwise else "it has one channel"
    return ""


def _geometry(conv: Conv) -> Geometry:
    sizes = conv.kernel, conv.stride, conv.padding, conv.dilation
    return Geometry(conv.in_channels, conv.out_channels, *sizes, conv.groups)


def _read(path: str, node: fx.Node, graph_module: fx.GraphModule) -> DenseLayer:
    ones = torch.ones(Conv.of(node).out_channels, dtype=torch.float64)
    found, result, follower = (ones, torch.zeros_like(ones)), node, _only_user(node)
    if follower is not None and BatchNorm.matches(follower) and isinstance(follower.meta["val"], torch.Tensor):
        found, result = _affine(BatchNorm.of(follower), graph_module) or found, follower
    scale, shift = found
    alive = scale.abs()[scale != 0]
    smallest = SMALLEST_SCALE * alive.median() if len(alive) else torch.ones_like(scale[0])
    scale = torch.where(scale.abs() < smallest, smallest, scale)
    return DenseLayer(path, node, _geometry(Conv.of(node)), scale, shift, result, _skip(result))


def _affine(norm: BatchNorm, graph_module: fx.GraphModule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The scale and shift of a normalisation, or None if they are computed at run time."""
    if not all(
        one is None or is_constant(one) for one in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    ):
        return None
    mean, variance = (constant(graph_module, one).double() for one in (norm.running_mean, norm.running_var))
    scale, shift = torch.rsqrt(variance + norm.eps), torch.zeros_like(mean)
    if norm.weight is not None:
        scale = scale * constant(graph_module, norm.weight).double()
    if norm.bias is not None:
        shift = constant(graph_module, norm.bias).double()
    return scale, shift - scale * mean


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _skip(result: fx.Node) -> fx.Node | None:
    """The other summand of a sum of like shapes that alone reads `result`."""
    user = _only_user(result)
    if user is None or not Binary.matches(user):
        return None
    binary = Binary.of(user)
    others = [one for one in (binary.input, binary.other) if isinstance(one, fx.Node) and one is not result]
    is_sum = binary.kind == "add" and binary.alpha == 1 and len(others) == 1
    return others[0] if is_sum and not is_constant(others[0]) and shape(others[0]) == shape(result) else None


def module_at(model: nn.Module, path: str) -> Layer:
    """The convolution of `model` at `path`; raises LookupError if there is none."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise LookupError(f"the model has no module {path!r}") from error
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        raise LookupError(f"{path!r} is {type(module).__name__}, not a convolution")
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return module
