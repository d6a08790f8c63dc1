"""torch.compile(backend="sepc"): Dynamo's graphs, weights that change, and what is left to PyTorch with a reason."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import sepc
from sepc import torch_compile
from sepc.compiled import CompiledModel
from sepc.torch_compile import backend
from tests.helpers import Function

ROOT = Path(__file__).parents[1]
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graphs of other tests, no warnings given before, and no gradients."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch_compile._Eager, "_told", set())
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been told since the last time about graphs that run in PyTorch."""
    caplog.set_level(logging.INFO, "sepc")

    def messages() -> list[str]:
        found = [one.getMessage() for one in caplog.records if "runs in PyTorch" in one.getMessage()]
        caplog.clear()
        return found

    return messages


def model(function: Callable[..., Any] = lambda self, x: self.conv(x).relu()) -> Function:
    return Function(function, conv=nn.Conv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4)).eval()


def check(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(pytree.tree_leaves(actual), pytree.tree_leaves(expected), rtol=1e-4, atol=1e-4)


def compiled(module: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(module, backend=backend, options=options or None)


# ---- the entry point


def test_the_backend_is_found_by_its_name_without_importing_sepc() -> None:
    code = """
import sys, torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
x = torch.randn(1, 3, 8, 8)
assert "sepc" not in sys.modules
fast = torch.compile(model, backend="sepc", options={"num_threads": 1})
with torch.no_grad():
    assert torch.allclose(fast(x), model(x), atol=1e-5)
assert "sepc.torch_compile" in sys.modules and "tvm" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_entry_point_is_this_backend() -> None:
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="sepc")
    assert entry.load() is backend


# ---- graphs


def test_graph_breaks_and_control_flow_are_dynamos(told: Callable[[], list[str]]) -> None:
    def branches(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if y.sum() > 0:
            return self.norm(y)
        return y * 2

    module = model(branches)
    fast = compiled(module)
    for x in (X, -X, X + 3, X - 3):
        check(fast(x), module(x))
    assert told() == []


@pytest.mark.parametrize("dynamic", [None, True])
def test_new_shapes_and_numbers_are_right(dynamic: bool | None, told: Callable[[], list[str]]) -> None:
    module = model(lambda self, x, scale: (self.conv(x).flatten(2).mean(2) * scale, x.shape[2]))
    fast = torch.compile(module, backend=backend, dynamic=dynamic)
    for shape, scale in (((1, 3, 8, 8), 2), ((2, 3, 8, 8), 3), ((3, 3, 9, 8), 4), ((1, 3, 8, 8), 2)):
        x = torch.randn(shape)
        check(fast(x, scale), module(x, scale))
    assert told() == []


def test_a_model_in_half_and_nested_results(told: Callable[[], list[str]]) -> None:
    module = model(lambda self, x: {"a": [self.conv(x), x.shape[0]], "b": (None, x[:, 1:])}).bfloat16()
    result = compiled(module)(X.bfloat16())
    expected = module(X.bfloat16())
    torch.testing.assert_close(result["a"][0], expected["a"][0], rtol=0.02, atol=0.02)
    assert (result["a"][1], result["b"][0]) == (1, None)
    assert told() == []


def test_autocast_is_that_of_the_call() -> None:
    module = model()
    fast = compiled(module)
    with torch.autocast("cpu", torch.bfloat16):
        result = fast(X)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), module(X), rtol=0.02, atol=0.02)
    check(fast(X), module(X))


# ---- weights


def optimizer_step(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with torch.enable_grad():
        module(X).square().sum().backward()
    optimizer.step()


def through_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.5)


def other_memory(module: Any) -> None:
    module.conv.weight.data = torch.randn_like(module.conv.weight)


def in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module.load_state_dict(model().state_dict())


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        through_data,
        other_memory,
        in_inference_mode,
        lambda module: module.load_state_dict(model().state_dict()),
        lambda module: module.load_state_dict(model().state_dict(), assign=True),
        lambda module: module.norm.running_mean.add_(1),
        lambda module: module.conv.bias[2:3].fill_(9.0),
        lambda module: setattr(module, "conv", nn.Conv2d(3, 4, 3, padding=1)),
    ],
)  # fmt: skip
def test_changed_weights_are_never_stale(change: Callable[[Any], Any]) -> None:
    module = model(lambda self, x: self.norm(self.conv(x)))
    fast = compiled(module, num_threads=1)
    before = fast(X)
    check(before, module(X))
    change(module)
    for _ in range(2):
        check(fast(X), module(X))
    assert not torch.allclose(fast(X), before)


def test_a_graph_is_compiled_anew_once_its_weights_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    fast = compiled(module, num_threads=1)
    compilations: list[int] = []
    original = sepc.CompiledModel._missing
    monkeypatch.setattr(
        sepc.CompiledModel, "_missing", lambda *arguments: (compilations.append(1), original(*arguments))[1]
    )
    for changes, expected in ((False, 1), (True, 1), (True, 1), (False, 2), (False, 2)):
        if changes:
            module.conv.weight.mul_(2)
        check(fast(X), module(X))
        assert len(compilations) == expected


def test_instances_of_one_class_share_a_graph_and_keep_their_weights() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).relu()

    blocks = nn.Sequential(*[Block() for _ in range(3)])
    expected = blocks(X)
    for block in blocks:
        block.compile(backend=backend)
    for _ in range(2):
        check(blocks(X), expected)


def test_a_model_that_nobody_uses_is_not_kept_alive() -> None:
    module = model()
    compiled(module)(X)
    weight = weakref.ref(module.conv.weight)
    del module
    gc.collect()
    assert weight() is None


# ---- what PyTorch runs


def test_gradients_are_pytorchs_and_a_warning_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    fast = compiled(module)
    with torch.enable_grad():
        for _ in range(2):
            fast(X).sum().backward()
        found = module.conv.weight.grad.clone() / 2
        module.zero_grad()
        module(X).sum().backward()
        check(found, module.conv.weight.grad)
        inside = model(lambda self, x: self.conv(x) * 2)
        assert compiled(inside)(X).requires_grad
    warnings = [one for one in caplog.records if one.levelno == logging.WARNING and "gradients" in one.getMessage()]
    assert len(warnings) == 1
    check(fast(X), module(X))


def test_gradients_switched_on_inside_of_the_model_are_pytorchs(told: Callable[[], list[str]]) -> None:
    def enabling(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return self.conv(x)

    assert compiled(model(enabling))(X).requires_grad
    assert any("gradients" in one for one in told())


def writes_to_input(self: Any, x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return self.conv(x)


def writes_to_buffer(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.norm.running_mean.add_(1)
    return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("function", "is_training", "reason"),
    [
        (writes_to_input, False, "changes its inputs"),
        (writes_to_buffer, False, "changes its inputs, or a buffer"),
        (lambda self, x: self.norm(self.conv(x)), True, "changes its inputs, or a buffer"),
        (lambda self, x: nn.functional.dropout(self.conv(x)), True, "training"),
    ],
)
def test_what_cannot_be_compiled_runs_in_pytorch_with_the_reason(
    function: Callable[..., Any], is_training: bool, reason: str, told: Callable[[], list[str]]
) -> None:
    module, other = (model(function).train(is_training) for _ in range(2))
    other.load_state_dict(module.state_dict())
    fast, x, y = compiled(module), X.clone(), X.clone()
    for _ in range(2):
        torch.manual_seed(0)
        actual = fast(x)
        torch.manual_seed(0)
        check(actual, other(y))
    check((x, module.state_dict()), (y, other.state_dict()))
    assert reason in told()[0]


def test_results_that_are_views_of_an_input_are_that(told: Callable[[], list[str]]) -> None:
    fast = compiled(model(lambda self, x: (self.conv(x), x[:, 1:])))
    assert fast(X)[1].data_ptr() == X[:, 1:].data_ptr()
    assert told() == []
    with_gaps = torch.randn(1, 3, 8, 16)[..., ::2]
    assert fast(with_gaps)[1].data_ptr() == with_gaps[:, 1:].data_ptr()
    assert told() == []


def test_results_that_are_views_of_weights_or_of_results_are_that(told: Callable[[], list[str]]) -> None:
    def parts(self: Any, x: torch.Tensor) -> Any:
        y = self.conv(x).flatten(2)
        return y, *y.split(20, dim=2), self.conv.weight[1:]

    module = model(parts)
    fast = compiled(module)
    for _ in range(2):
        check(fast(X), module(X))
        whole, first, second, *_, weight = fast(X)
        assert first.data_ptr() == whole.data_ptr()
        assert second.data_ptr() == whole.data_ptr() + 20 * 4
        assert weight.data_ptr() == module.conv.weight[1:].data_ptr()
    assert told() == []


def test_a_model_that_keeps_what_it_returns_is_compiled_once(told: Callable[[], list[str]]) -> None:
    """As torchvision's anchors: a result that is a weight becomes that weight again, for the next call."""

    def keeps(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.kept = [one.to(x.dtype) for one in self.kept]
        return self.conv(x) * self.kept[0]

    module = model(keeps)
    module.kept = [torch.tensor(2.0)]
    fast, compilations = compiled(module), []
    with pytest.MonkeyPatch.context() as patch:
        original = CompiledModel._specialize
        patch.setattr(CompiledModel, "_specialize", lambda *args: compilations.append(1) or original(*args))
        for _ in range(4):
            check(fast(X), 2 * module.conv(X))
    assert len(compilations) == 1
    assert told() == []


def test_graphs_after_a_break_in_inference_mode_are_compiled(told: Callable[[], list[str]]) -> None:
    def broken(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        torch._dynamo.graph_break()
        return self.norm(y).relu()

    layer = model(broken)
    with torch.inference_mode():
        check(compiled(layer)(X), layer(X))
    assert not told()


def test_a_model_made_in_inference_mode_runs_in_pytorch(told: Callable[[], list[str]]) -> None:
    with torch.inference_mode():
        module = model()
        check(compiled(module)(X), module(X))
    assert "made in inference mode" in told()[0]


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonsense": 1}, r"no option 'nonsense'[\s\S]*target, dtype, num_threads, optimize, shape_limit, fullgraph"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"optimize": "nonsense"}, "nothing to optimize called 'nonsense'"),
        ({"target": "nonsense"}, "no target 'nonsense'"),
    ],
)
def test_wrong_options_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as caught:
        compiled(model(), **options)(X)
    assert isinstance(caught.value.inner_exception, sepc.SepcError)


def test_a_mode_is_no_option() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no option 'mode'"):
        torch.compile(model(), backend=backend, mode="max-autotune")(X)


def test_options_reach_the_compiler() -> None:
    fast = compiled(model(lambda self, x: self.conv(x).relu()), target="x86-64-v3", num_threads=1, optimize="memory")
    check(fast(X), fast._orig_mod(X))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda self, x: self.conv(x).topk(2).values,
            r"aten.topk.default \(has several results\): .*test_torch_compile.py:\d+",
        ),
        (writes_to_input, "changes its inputs"),
    ],
)
def test_fullgraph_leaves_nothing_to_pytorch(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(sepc.ModelError, match=message):
        compiled(model(function), fullgraph=True)(X.clone())
