"""Print a graph as readable Python: one line per node with its type and source, each region a nested function."""

from __future__ import annotations

import math
import operator
from pathlib import Path

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.ir.origin import origin_of

_INDENT = "    "


def print_graph(graph_module: fx.GraphModule, name: str = "forward", sources: bool = True, decorator: str = "") -> str:
    """The graph as valid Python source; `sepc.ir.script` makes a whole program of it.

    Args:
        graph_module: a captured graph, or one with regions.
        name: the name of the printed function.
        sources: whether comments name the user's source line; goldens leave it out, since it moves with the file.
        decorator: of the functions that are regions; none if empty.
    """
    return "\n".join(_function(graph_module, name, "", sources, f"@{decorator}" if decorator else "")) + "\n"


def describe_type(value: object) -> str:
    """A type as ``float32[1, 8, 4, 4]``; strides are added where the tensor is neither contiguous nor channels-last."""
    if isinstance(value, list | tuple):
        return "(" + ", ".join(describe_type(item) for item in value) + ")"
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.is_contiguous():
        return text
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return text + " channels_last"
    return text + f" strides {list(value.stride())}"


def _function(graph_module: fx.GraphModule, name: str, indent: str, sources: bool, decorator: str) -> list[str]:
    inner = indent + _INDENT
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    lines = [f"{indent}def {name}({', '.join(['self', *(node.name for node in placeholders)])}):"]
    lines += [f"{inner}# {node.name}: {_comment(node, sources)}" for node in placeholders]
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            region = getattr(graph_module, str(node.target), None)
            lines.append("")
            if isinstance(region, fx.GraphModule):
                lines += [inner + decorator] if decorator else []
                lines += [*_function(region, str(node.target), inner, sources, decorator), ""]
        if node.op == "output":
            lines.append(f"{inner}return {_value(node.args[0])}")
        elif node.op != "placeholder":
            lines.append(f"{inner}{node.name} = {_expression(node)}  # {_comment(node, sources)}")
    return lines


def _expression(node: fx.Node) -> str:
    if node.op == "get_attr":
        return f"self.{node.target}"
    arguments = [_value(value) for value in node.args]
    arguments += [f"{key}={_value(value)}" for key, value in node.kwargs.items()]
    if node.op == "call_module":
        return f"{node.target}({', '.join(['self.' + str(node.target), *arguments])})"
    if node.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: object) -> str:
    return str(target) if isinstance(target, OpOverload) else str(getattr(target, "__name__", target))


def _value(value: object) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_value, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.device):
        return f"torch.device('{value}')"
    return repr(value)


def _comment(node: fx.Node, sources: bool) -> str:
    parts = [describe_type(node.meta.get("val"))]
    if "sepc_layout" in node.meta:
        parts.append(f"layout {node.meta['sepc_layout']}")
    parts += [" ".join(str(node.meta[key]).split()) for key in ("sepc_region", "sepc_tiling") if key in node.meta]
    origin = origin_of(node)
    if origin.pass_name != "frontend":
        parts.append(f"by {origin.pass_name}")
    if sources and origin.source:
        parts.append(_short_path(origin.source))
    return "; ".join(parts)


def _short_path(source: str) -> str:
    path, _, line = source.rpartition(":")
    return f"{Path(*Path(path).parts[-2:])}:{line}"
