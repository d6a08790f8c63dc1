"""The printed graph is valid Python that shows types, sources and regions."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from sepc.frontend.export import capture
from sepc.ir.printer import describe_type, print_graph
from sepc.passes.manager import finish

if TYPE_CHECKING:
    from collections.abc import Callable


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.conv(x).clamp(max=float("inf")).split(2, 1)
        return first, second.to(torch.float64)


def small_graph() -> fx.GraphModule:
    return capture(Small().eval(), (torch.randn(1, 3, 8, 8),)).graph_module


def test_a_captured_graph_prints_as_golden_python(golden: Callable[[str, str], None]) -> None:
    text = print_graph(small_graph(), sources=False)
    ast.parse(text)
    golden("ir/captured", text)


def test_sources_are_named_where_asked() -> None:
    assert "ir/test_printer.py:" in print_graph(small_graph())
    assert "test_printer.py" not in print_graph(small_graph(), sources=False)


def test_a_region_prints_as_a_nested_function(golden: Callable[[str, str], None]) -> None:
    module = small_graph()
    conv = next(node for node in module.graph.nodes if "conv2d" in node.name)
    region, inner = nn.Module(), fx.Graph()
    region.register_buffer("weight", torch.ones(4, 3, 3, 3))
    x = inner.placeholder("x")
    inner.output(inner.call_function(conv.target, (x, inner.get_attr("weight"))))
    module.add_submodule("region_0_conv", fx.GraphModule(region, inner))
    with module.graph.inserting_before(conv):
        call = module.graph.call_module("region_0_conv", (conv.args[0],))
    conv.replace_all_uses_with(call)
    finish(module, "group")
    call.meta["sepc_layout"] = (144, 1, 24, 4)
    text = print_graph(module, sources=False)
    ast.parse(text)
    assert "def region_0_conv(self, x):" in text
    golden("ir/region", text)


def test_types_show_strides_that_are_not_the_usual_ones() -> None:
    x = torch.empty(1, 4, 3, 3)
    assert describe_type(x) == "float32[1, 4, 3, 3]"
    assert describe_type(x.contiguous(memory_format=torch.channels_last)) == "float32[1, 4, 3, 3] channels_last"
    assert describe_type(torch.empty(2, 3, dtype=torch.int64).t()) == "int64[3, 2] strides [1, 3]"
    assert describe_type((x, [x])) == "(float32[1, 4, 3, 3], (float32[1, 4, 3, 3]))"
