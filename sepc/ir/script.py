"""A graph as a Python program that builds it again: what `print_graph` prints, with imports, inputs and constants."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import fx
from torch._ops import OpOverload

from sepc.ir.printer import describe_type, print_graph

Constant = Callable[[torch.Tensor], str]
"""Writes a constant as a Python expression."""

_PROGRAM = """\
# {title}. Run this file, or import it: `graph_module` is the graph, which PyTorch runs and torch.fx takes apart.
{imports}

{namespaces}


{forward}

inputs = ({inputs})  # random
{constants}
graph_module = rebuild.build(forward, inputs, constants)

if __name__ == "__main__":
    print(graph_module(*inputs))
"""


def script(
    graph_module: fx.GraphModule,
    title: str,
    constant: Constant | None = None,
    sources: bool = True,
) -> str:
    """A program that builds `graph_module` as the variable of that name.

    Args:
        graph_module: a graph whose nodes are typed.
        title: what the first line calls it.
        constant: writes each constant as an expression, in which `here` is the program's directory; without it they
            become random numbers.
        sources: whether comments name the user's source lines.
    """
    namespaces = sorted({name.partition(".")[0] for name in _operators(graph_module)} | {"aten"})
    inputs = [f"{_stand_in(node.meta['val'])}," for node in graph_module.graph.find_nodes(op="placeholder")]
    return _PROGRAM.format(
        title=title,
        imports="\n".join(_imports(namespaces, constant is not None)),
        namespaces="\n".join(f"{name} = torch.ops.{name}" for name in namespaces),
        forward=print_graph(graph_module, sources=sources, decorator="rebuild.region"),
        inputs=" ".join(inputs),
        constants="\n".join(_constant_lines(graph_module, constant)),
    )


def _imports(namespaces: list[str], has_files: bool) -> Iterator[str]:
    if has_files:
        yield "from pathlib import Path\n"
    yield "import torch"
    # Operators outside of PyTorch are there once the package of that name is imported, as torchvision's are.
    packages = (name for name in namespaces if name != "aten" and importlib.util.find_spec(name) is not None)
    yield from (f"import {name}  # for its operators" for name in packages)
    yield "\nfrom sepc.ir import rebuild"


def _constant_lines(graph_module: fx.GraphModule, constant: Constant | None) -> Iterator[str]:
    write = constant or _stand_in
    if constant is not None:
        yield "here = Path(__file__).parent"
    yield "constants = {" if constant is not None else "constants = {  # random, as numbers are not printed"
    for name, value in sorted(_constants(graph_module), key=lambda item: item[0]):
        yield f"    {name!r}: {write(value)},  # {describe_type(value)}"
    yield "}"


def _graphs(graph_module: fx.GraphModule, prefix: str = "") -> Iterator[tuple[str, fx.GraphModule]]:
    """The graph and its regions, each with what comes in front of its constants' names."""
    yield prefix, graph_module
    for node in graph_module.graph.find_nodes(op="call_module"):
        child = graph_module.get_submodule(str(node.target))
        if isinstance(child, fx.GraphModule):
            yield from _graphs(child, f"{prefix}{node.target}.")


def _constants(graph_module: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, graph in _graphs(graph_module):
        for target in dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="get_attr")):
            yield prefix + target, getattr(graph, target)


def _operators(graph_module: fx.GraphModule) -> Iterator[str]:
    for _, graph in _graphs(graph_module):
        yield from (str(node.target) for node in graph.graph.nodes if isinstance(node.target, OpOverload))


def _stand_in(value: torch.Tensor) -> str:
    strides = "" if value.is_contiguous() else f", strides={list(value.stride())}"
    return f"rebuild.stand_in({str(value.dtype).removeprefix('torch.')!r}, {list(value.shape)}{strides})"
