"""Capturing models: structure of inputs and outputs, constants, origins, and one clear error per mistake."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sepc.errors import InputError, ModelError
from sepc.frontend.export import Captured, Constant, capture
from sepc.ir.verify import verify


class Mixed(nn.Module):
    """Nested and keyword inputs, a specialised number, constants of three kinds, an output of every kind of leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("shift", torch.randn(4, 1, 1), persistent=False)
        self.plain = torch.ones(1)

    def forward(self, x: torch.Tensor, more: dict[str, list[torch.Tensor]], scale: int = 1, flag: bool = False) -> Any:
        y = self.conv(x) * scale + self.shift + self.plain + torch.tensor(2.0)
        return {"y": y if flag else -y, "none": None, "scale": scale, "pair": (more["a"][0] + 1, x.shape[2]), "x": x}


X = torch.randn(1, 3, 6, 6)


def test_inputs_and_outputs_of_every_kind_map_to_the_graph_and_back() -> None:
    model, more = Mixed().eval(), {"a": [torch.randn(2)]}
    captured = capture(model, (X, more), {"flag": True, "scale": 3})
    verify(captured.graph_module)
    assert len(captured.input_names) == 2
    assert Constant(3) in captured.input_leaves
    # Keywords may come in another order.
    outputs = captured.graph_module(*captured.flatten((X, more), {"scale": 3, "flag": True}))
    actual, expected = captured.unflatten(outputs), model(X, more, scale=3, flag=True)
    assert list(actual) == list(expected)
    assert (actual["none"], actual["scale"], actual["pair"][1]) == (None, 3, 6)
    torch.testing.assert_close((actual["y"], actual["pair"][0], actual["x"]), (expected["y"], expected["pair"][0], X))


def test_arguments_that_differ_from_the_captured_ones_are_errors() -> None:
    captured = capture(Mixed().eval(), (X, {"a": [torch.randn(2)]}), {"scale": 3})
    with pytest.raises(InputError, match="captured with 3, and is called with 4"):
        captured.flatten((X, {"a": [torch.randn(2)]}), {"scale": 4})
    with pytest.raises(InputError, match="another structure"):
        captured.flatten((X, {"b": [torch.randn(2)]}), {"scale": 3})
    with pytest.raises(InputError, match="must be a tensor"):
        captured.flatten((X, {"a": [1.0]}), {"scale": 3})


def test_constants_have_flat_names_and_nodes_know_their_source() -> None:
    graph_module = capture(Mixed().eval(), (X, {"a": [torch.randn(2)]})).graph_module
    names = {node.target for node in graph_module.graph.find_nodes(op="get_attr")}
    assert {"conv_weight", "conv_bias", "shift", "plain"} <= names
    assert not any("." in name for name in names)
    multiply = next(node for node in graph_module.graph.nodes if node.name.startswith("mul"))
    assert multiply.meta["sepc_origin"].pass_name == "frontend"
    assert Path(multiply.meta["sepc_origin"].source.split(":")[0]).name == "test_export.py"


def test_names_that_become_equal_when_flattened_stay_apart() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Module()
            self.a.b = nn.Parameter(torch.tensor(1.0))
            self.a_b = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.a.b - self.a_b

    captured = capture(Clash(), (X,))
    torch.testing.assert_close(captured.graph_module(X)[0], X - 2)


def test_an_exported_program_and_no_grad_inside_the_model_are_captured() -> None:
    class NoGrad(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return x.relu() + 1

    torch.testing.assert_close(capture(NoGrad(), (X,)).graph_module(X)[0], X.relu() + 1)
    program = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (X,))
    captured: Captured = capture(program, ())
    torch.testing.assert_close(captured.graph_module(X)[0], program.module()(X))


def test_training_mode_names_the_submodules() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    with pytest.raises(ModelError, match=r"training: 1, 2\n.*model.eval\(\)"):
        capture(model, (X,))


def test_training_mode_without_an_effect_is_allowed() -> None:
    capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.0)), (X,))


def test_functional_dropout_in_training_is_found_in_the_graph() -> None:
    class Functional(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    with pytest.raises(ModelError, match=r"training mode.*\n.*test_export.py:\d+"):
        capture(Functional().eval(), (X,))


def test_parameters_must_be_of_a_known_type_on_the_cpu() -> None:
    model = nn.Conv2d(3, 4, 3)
    model.weight = nn.Parameter(model.weight.to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match=r"(?s)unsupported type.*Where: weight.*float8_e4m3fn.*float32, float16"):
        capture(model, (X,))
    with pytest.raises(ModelError, match=r"(?s)not on the CPU.*weight.*meta"):
        capture(nn.Conv2d(3, 4, 3, device="meta"), (X,))


def test_inputs_must_be_of_a_known_type() -> None:
    with pytest.raises(InputError, match=r"(?s)unsupported type.*args\[0\].*float8_e5m2"):
        capture(nn.ReLU(), (X.to(torch.float8_e5m2),))
    for dtype in (torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64):
        capture(nn.Identity(), (torch.ones(2, dtype=dtype),))


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, bias=False), nn.ConvTranspose2d(3, 4, 3, bias=False)])
def test_operands_of_different_types_are_refused_as_in_eager(layer: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="expected scalar type"):
        layer(X.double())
    with pytest.raises(ModelError, match=r"(?s)different types.*float64 and float32.*convert the input"):
        capture(layer, (X.double(),))


class Raises(nn.Module):
    """Fails to trace in the way that its argument says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "branch" and x.sum() > 0:  # the branch
            return x
        if self.way == "shape":
            return x.view(7, 7, 7)  # the shape
        if self.way == "buffer":
            self.count += 1  # the buffer
        if self.way == "input":
            x.add_(1)  # the input
        return x.nonzero() if self.way == "nonzero" else x + self.count  # the size


@pytest.mark.parametrize(
    ("way", "what", "why", "line"),
    [
        ("branch", "cannot trace", "depends on values inside a tensor", "the branch"),
        ("shape", "cannot trace", r"'\[7, 7, 7\]' is invalid for input of size 108", "the shape"),
        ("buffer", "changes its own state", "buffer 'count'", "the buffer"),
        ("input", "changes its own state", "input 'x'", "the input"),
        ("nonzero", "dynamic shape", "nonzero", "the size"),
    ],
)
def test_an_untraceable_model_names_the_users_line_and_the_reason(
    way: str, what: str, why: str, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    number = next(index for index, text in enumerate(Path(__file__).read_text().splitlines(), 1) if f"# {line}" in text)
    with pytest.raises(ModelError, match=rf"(?s){what}.*test_export.py:{number}.*{why}"):
        capture(Raises(way).eval(), (X,))
    assert capfd.readouterr().err == ""


def test_a_dynamic_shape_of_an_exported_program_is_an_error() -> None:
    dynamic = ({0: torch.export.Dim("batch", min=2, max=8)},)
    program = torch.export.export(nn.ReLU(), (torch.randn(4, 3),), dynamic_shapes=dynamic)
    with pytest.raises(ModelError, match="dynamic shape"):
        capture(program, ())


def test_capturing_a_deep_network_takes_seconds() -> None:
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()) for _ in range(50)]
    started = time.process_time()
    capture(nn.Sequential(*blocks).eval(), (torch.randn(1, 8, 8, 8),))
    assert time.process_time() - started < 10
