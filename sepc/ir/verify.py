"""The structural verifier: what must hold of every graph between two passes."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.errors import VerificationError
from sepc.ir.origin import Origin, origin_of

META_KEYS = frozenset({"sepc_origin", "sepc_region", "sepc_tiling", "sepc_layout"})


def verify(graph_module: fx.GraphModule, is_region: bool = False) -> None:
    """Check `graph_module` and its regions against the IR contract; raises VerificationError at the first breach.

    The one node that a region returns may be an operator with several results; a whole graph returns tensors.
    """
    for node in graph_module.graph.nodes:
        _verify_meta(node)
        if node.op == "get_attr":
            _verify_constant(graph_module, node)
        elif node.op == "call_function":
            _verify_call(node)
        elif node.op == "call_module":
            _verify_region(graph_module, node)
        elif node.op == "output":
            _verify_output(node, is_region)
        elif node.op != "placeholder":
            raise _breach(node, f"an op of kind {node.op!r} has no place in the IR", "call an ATen overload instead")


def verify_numerics(
    name: str, reference: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], tolerance: float = 1e-4
) -> float:
    """Compare the graph outputs before and after pass `name`; returns the largest relative difference.

    For each output the difference is max |y - ref| / max |ref| (max |y - ref| where the reference is 0).
    Raises VerificationError where it exceeds `tolerance`, where shapes or dtypes differ, or where only one is NaN.
    """
    if len(reference) != len(outputs):
        raise VerificationError(f"{name} changed the number of outputs", why=f"{len(reference)} became {len(outputs)}")
    worst = 0.0
    for index, (expected, actual) in enumerate(zip(reference, outputs, strict=True)):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            why = f"{expected.dtype}{list(expected.shape)} became {actual.dtype}{list(actual.shape)}"
            raise VerificationError(f"{name} changed the type of an output", where=f"output {index}", why=why)
        difference = relative_difference(expected, actual)
        if not difference <= tolerance:
            why = f"max|y - ref| / max|ref| = {difference:.3g}, more than {tolerance:g}"
            raise VerificationError(f"{name} changed the result", where=f"output {index}", why=why)
        worst = max(worst, difference)
    return worst


def relative_difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The largest |actual - expected|, over the largest |expected|; equal infinities and NaNs do not differ."""
    if expected.numel() == 0:
        return 0.0
    expected, actual = expected.to(torch.float64), actual.to(torch.float64)
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    difference = float(torch.where(same, 0.0, (actual - expected).abs()).max())
    return difference / largest if largest > 0 else difference


def _breach(node: fx.Node, why: str, fix: str = "") -> VerificationError:
    source = origin_of(node).source
    where = f"node {node.name!r}" + (f", from {source}" if source else "")
    return VerificationError("The graph breaks the IR contract", where=where, why=why, fix=fix)


def _is_typed(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_is_typed(item) for item in value)
    return isinstance(value, torch.Tensor)


def _verify_meta(node: fx.Node) -> None:
    unknown = [key for key in node.meta if key.startswith("sepc_") and key not in META_KEYS]
    if unknown:
        raise _breach(node, f"unknown annotation {unknown[0]!r}", f"use one of {', '.join(sorted(META_KEYS))}")
    origin = node.meta.get("sepc_origin")
    if origin is not None and not isinstance(origin, Origin):
        raise _breach(node, f"sepc_origin is {type(origin).__name__}, not Origin")
    if node.op != "output" and not _is_typed(node.meta.get("val")):
        raise _breach(node, "it has no tensor type", "set meta['val'] to a FakeTensor")


def _verify_constant(graph_module: fx.GraphModule, node: fx.Node) -> None:
    name = str(node.target)
    if "." in name:
        raise _breach(node, f"the constant's name {name!r} is not flat", "register it under a name without dots")
    value = getattr(graph_module, name, None)
    if not isinstance(value, torch.Tensor):
        raise _breach(node, f"the module has no tensor {name!r}")
    declared = node.meta["val"]
    if value.shape != declared.shape or value.dtype != declared.dtype:
        why = f"{name!r} is {value.dtype}{list(value.shape)}, its type says {declared.dtype}{list(declared.shape)}"
        raise _breach(node, why)


def _verify_call(node: fx.Node) -> None:
    if node.target is operator.getitem:
        return
    if not isinstance(node.target, OpOverload):
        raise _breach(
            node, f"{node.target} is not an ATen overload", "call an overload such as torch.ops.aten.relu.default"
        )
    if node.target._schema.is_mutable:
        raise _breach(node, f"{node.target} changes its argument", "use the functional form of the operator")


def _verify_region(graph_module: fx.GraphModule, node: fx.Node) -> None:
    region = getattr(graph_module, str(node.target), None)
    if not isinstance(region, fx.GraphModule):
        raise _breach(
            node, f"{node.target!r} is {type(region).__name__}, not a GraphModule", "regions are GraphModules"
        )
    (result,) = region.graph.output_node().args
    if not isinstance(result, fx.Node) and not (isinstance(result, tuple) and len(result) == 2):
        why = f"region {node.target!r} must return one tensor, or one and its row means, and returns {result}"
        raise _breach(node, why)
    verify(region, is_region=True)


def _verify_output(node: fx.Node, is_region: bool) -> None:
    (result,) = node.args
    if is_region and isinstance(result, fx.Node) and _is_typed(result.meta.get("val")):
        return
    results = (result,) if isinstance(result, fx.Node) else result
    if not isinstance(results, list | tuple):
        raise _breach(node, f"it returns {result!r}, not a flat tuple of tensors")
    for item in results:
        if not isinstance(item, fx.Node) or not isinstance(item.meta.get("val"), torch.Tensor):
            raise _breach(node, f"it returns {item!r}, which is not a tensor")
