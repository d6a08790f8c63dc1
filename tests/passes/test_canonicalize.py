"""Canonicalize: one spelling of each operation, the same result, and a reason where a rule does not apply."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from sepc.frontend.export import capture
from sepc.ir.layers import Conv
from sepc.ir.ops import aten
from sepc.ir.printer import print_graph
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.manager import PassContext, PassManager

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.randn(2, 4, 8, 8)


class Function(nn.Module):
    """A function as a module, with a convolution's weight, a large and a small constant to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def run(function: Callable[..., Any], *inputs: torch.Tensor, limit: int = 65536) -> tuple[fx.GraphModule, PassContext]:
    """The canonical graph of `function`, verified to compute the same, to be stable, and to match eager."""
    inputs = inputs or (X,)
    model = Function(function).eval()
    captured = capture(model, inputs)
    module, context = captured.graph_module, PassContext(example_inputs=inputs)
    PassManager([Canonicalize(limit)], verify_each=True).run(module, context)
    with torch.no_grad():
        torch.testing.assert_close(captured.unflatten(module(*inputs)), model(*inputs), rtol=1e-4, atol=1e-5)
    assert not Canonicalize(limit).run(module, PassContext()), "a second run changes nothing"
    return module, context


def operators(module: fx.GraphModule) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in module.graph.nodes if node.op == "call_function"]


def conv(self: Function, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return functional.conv2d(x, self.weight, **options)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # no-ops
        (lambda self, x: functional.dropout(x, 0.5, False).relu(), ["relu.default"]),
        (lambda self, x: x.clone().detach().contiguous().to(torch.float32).relu(), ["relu.default"]),
        (lambda self, x: (x.view(2, 4, 8, 8)[:, :, :, :] * 1 + 0).relu(), ["relu.default"]),
        (lambda self, x: torch.cat([functional.pad(x, (0, 0))]).permute(0, 1, 2, 3).relu(), ["relu.default"]),
        (lambda self, x: x.expand(2, 4, 8, 8).relu(), ["relu.default"]),
        # products and sums
        (lambda self, x: torch.addcmul(self.vector[0], x, x), ["mul.Tensor", "add.Tensor"]),
        (lambda self, x: torch.addcmul(x, x, x, value=2), ["mul.Tensor", "mul.Tensor", "add.Tensor"]),
        # clamps
        (lambda self, x: functional.relu6(x), ["clamp.default"]),
        (lambda self, x: functional.hardtanh(x, -2.0, 3.0), ["clamp.default"]),
        (lambda self, x: x.clamp_min(0.5), ["clamp.default"]),
        (lambda self, x: x.clamp_max(0.5), ["clamp.default"]),
        (lambda self, x: x.clamp(min=0), ["relu.default"]),
        # powers
        (lambda self, x: x**2, ["square.default"]),
        (lambda self, x: x.abs().pow(0.5), ["abs.default", "sqrt.default"]),
        (lambda self, x: torch.pow(x.abs() + 1, -0.5), ["abs.default", "add.Tensor", "rsqrt.default"]),
        (lambda self, x: x**-1, ["reciprocal.default"]),
        (lambda self, x: x**3, ["pow.Tensor_Scalar"]),
        # global pooling
        (lambda self, x: x.mean((2, 3)), ["mean.dim", "view.default"]),
        (lambda self, x: x.mean((-1, -2), keepdim=True), ["mean.dim"]),
        (lambda self, x: functional.adaptive_avg_pool2d(x, 1), ["mean.dim"]),
        (lambda self, x: functional.adaptive_avg_pool2d(x, 1).flatten(1), ["mean.dim", "view.default"]),
        (lambda self, x: functional.avg_pool2d(x, 8), ["mean.dim"]),
        (lambda self, x: functional.adaptive_avg_pool3d(x[None], 1), ["view.default", "mean.dim"]),
        (lambda self, x: functional.adaptive_avg_pool1d(x.flatten(2), 1), ["view.default", "mean.dim"]),
        (lambda self, x: functional.adaptive_avg_pool2d(x, 2), ["adaptive_avg_pool2d.default"]),
        (lambda self, x: functional.avg_pool2d(x, 2), ["avg_pool2d.default"]),
        (lambda self, x: x.mean(1), ["mean.dim"]),
        # views and permutations
        (lambda self, x: x.flatten(1).reshape(2, 2, -1).unsqueeze(1).squeeze(1), ["view.default"]),
        (lambda self, x: x.transpose(1, 2).transpose(2, 3).permute(0, 2, 1, 3), ["permute.default"]),
        (lambda self, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).relu(), ["relu.default"]),
        # numbers
        (lambda self, x: x + torch.tensor(2.0), ["add.Tensor"]),
        (lambda self, x: torch.tensor([[3.0]]) * x, ["mul.Tensor"]),
        (lambda self, x: torch.add(x, 2, alpha=3), ["add.Tensor"]),
        # splits
        (lambda self, x: x.chunk(2, 1)[1], ["slice.Tensor"]),
        (lambda self, x: x.unbind(1)[1], ["select.int"]),
        (lambda self, x: torch.cat(x.split([1, 3], 1)[::-1], 1), ["slice.Tensor", "slice.Tensor", "cat.default"]),
        (lambda self, x: x.split(3, -1)[-1], ["slice.Tensor"]),
        # convolutions
        (lambda self, x: conv(self, x, padding="same"), ["conv2d.default"]),
        (lambda self, x: conv(self, x, padding="valid"), ["conv2d.default"]),
        (lambda self, x: conv(self, functional.pad(x, (1, 1, 2, 2)), padding=1), ["conv2d.default"]),
        (lambda self, x: conv(self, x[0]), ["select.int", "view.default", "conv2d.default", "view.default"]),
        (
            lambda self, x: functional.conv2d(x, self.weight[:, :, :2, :2], padding="same"),
            ["constant_pad_nd.default", "conv2d.default"],
        ),
        (lambda self, x: torch.conv_transpose2d(x, self.weight[:4]), ["conv_transpose2d.input"]),
        (
            lambda self, x: torch.convolution(x, self.weight[:4], None, [2, 2], [1, 1], [1, 1], True, [1, 0], 1),
            ["conv_transpose2d.input"],
        ),
        (
            lambda self, x: torch.conv_transpose2d(x[0], self.weight[:4], stride=2),
            ["select.int", "view.default", "conv_transpose2d.input", "view.default"],
        ),
        # gates
        (lambda self, x: functional.glu(x, 1), ["slice.Tensor", "slice.Tensor", "sigmoid.default", "mul.Tensor"]),
        # one output
        (lambda self, x: functional.batch_norm(x, self.vector, self.vector.exp()), ["batch_norm.default"]),
        (lambda self, x: torch.native_layer_norm(x, [8], None, None, 1e-5)[0], ["layer_norm.default"]),
        (lambda self, x: functional.max_pool2d(x, 2, return_indices=True)[0], ["max_pool2d.default"]),
        (
            lambda self, x: functional.max_pool3d(x[:, None], 2, return_indices=True)[0],
            ["view.default", "max_pool3d.default"],
        ),
        # normalisations
        (
            lambda self, x: functional.instance_norm(x, self.vector, self.vector.exp(), use_input_stats=False),
            ["batch_norm.default"],
        ),
        (lambda self, x: functional.instance_norm(x), ["instance_norm.default"]),
        (
            lambda self, x: functional.layer_norm(x, (4, 8, 8)),
            ["group_norm.default"],
        ),
        (
            lambda self, x: functional.layer_norm(x, (8, 8)),
            [
                "view.default",
                "permute.default",
                "group_norm.default",
                "permute.default",
                "clone.default",
                "view.default",
            ],
        ),
        (lambda self, x: functional.layer_norm(x[:, None], (1, 4, 8, 8)), None),
        (lambda self, x: functional.rms_norm(x, (8, 8)), ["view.default", "rms_norm.default", "view.default"]),
        (lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5), ["rms_norm.default"]),
        (lambda self, x: torch.rsqrt(1e-5 + (x * x).mean(3, True)) * x, ["rms_norm.default"]),
        (lambda self, x: x / x.pow(2).mean(-1, True).sqrt(), ["rms_norm.default"]),
        (
            lambda self, x: x * torch.rsqrt(x.pow(2).mean(1, True) + 1e-5),
            ["permute.default", "rms_norm.default", "permute.default", "clone.default"],
        ),
        (
            lambda self, x: x.softmax(2),
            ["permute.default", "softmax.int", "permute.default", "clone.default"],
        ),
        (lambda self, x: x.softmax(-1), ["softmax.int"]),
        # what only looks like a normalisation by the root of the mean square
        (
            lambda self, x: x * torch.rsqrt(x.relu().pow(2).mean(-1, True)),
            ["relu.default", "square.default", "mean.dim", "rsqrt.default", "mul.Tensor"],
        ),
        (
            lambda self, x: x * torch.rsqrt((x * x.relu()).mean(-1, True)),
            ["relu.default", "mul.Tensor", "mean.dim", "rsqrt.default", "mul.Tensor"],
        ),
        (
            lambda self, x: x.square().mean(-1, True).sqrt() / x,
            ["square.default", "mean.dim", "sqrt.default", "div.Tensor"],
        ),
        # constants
        (lambda self, x: x + self.vector.exp()[None, :, None, None] * 2, ["add.Tensor"]),
        (lambda self, x: x * torch.arange(8).float(), ["mul.Tensor"]),
        (lambda self, x: torch.addmm(self.vector[:2], x[0, 0], self.weight.flatten()[:16].view(8, 2)), None),
    ],
)
def test_spelling(function: Callable[..., Any], expected: list[str] | None) -> None:
    module, _ = run(function)
    assert expected is None or operators(module) == expected


def test_padding_is_given_in_numbers() -> None:
    module, _ = run(lambda self, x: conv(self, functional.pad(x, (1, 1, 2, 2)), padding="same", dilation=2))
    (node,) = [node for node in module.graph.nodes if Conv.matches(node)]
    assert Conv.of(node).padding == (4, 3)


def test_what_is_made_like_a_tensor_depends_on_its_shape_only() -> None:
    def mask(self: Function, x: torch.Tensor) -> torch.Tensor:
        windows = x.new_zeros(8, 8)
        windows[:4, 2:] = 3
        differ = (windows[:, None] - windows[:, :, None]) != 0
        penalty = torch.zeros_like(windows).masked_fill(differ[..., 0].new_full((8, 8), True), -100.0)
        return x + penalty + x.new_full((8,), 0.5) * torch.ones_like(x) + torch.full_like(x, 2)

    assert operators(run(mask)[0]) == ["add.Tensor"] * 3
    channels_last = X.to(memory_format=torch.channels_last)
    assert "ones_like.default" in operators(run(lambda self, x: x + torch.ones_like(x).cumsum(1), channels_last)[0])


def test_random_operators_are_not_folded() -> None:
    module = capture(Function(lambda self, x: x + torch.rand(4, 1, 1)), (X,)).graph_module
    Canonicalize().run(module, PassContext())
    assert any(name.startswith("rand") for name in operators(module))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: x.clone(), "must be a tensor of its own"),
        (lambda self, x: conv(self, functional.pad(x, (1, 1, 1, 1), value=2.0)), "pads with 2.0"),
        (lambda self, x: conv(self, functional.pad(x[:, :2], (0, 0, 0, 0, 1, 1))), "pads batch or channels"),
        (lambda self, x: conv(self, functional.pad(x, (-1, -1, 1, 1))), "crops"),
        (lambda self, x: conv(self, functional.pad(x, (0, 1, 0, 1))), r"pads \(0, 0\) before and \(1, 1\) after"),
        (lambda self, x: x * self.vector[:, None, None].expand(4, 200, 200)[:, :8, :8].relu(), None),
        (lambda self, x: x.sum() + self.vector[:, None, None].expand(4, 200, 200), "made of 16"),
        (lambda self, x: x.softmax(1), "over fewer than 8 elements"),
        (lambda self, x: functional.layer_norm(x[:, None, None], (1, 1, 4, 8, 8)), "over more than 4 dimensions"),
    ],
)
def test_a_rejection_gives_its_reason(function: Callable[..., Any], reason: str | None) -> None:
    _, context = run(function)
    messages = [note.message for note in context.notes if not note.taken]
    assert (reason is None and not messages) or any(re.search(str(reason), message) for message in messages)


def test_a_view_that_strides_do_not_allow_keeps_its_copy() -> None:
    # The channel shuffle: view, transpose, copy, view.
    module, _ = run(lambda self, x: x.view(2, 2, 2, 8, 8).transpose(1, 2).reshape(2, 4, 8, 8))
    assert Counter(operators(module)) == {"view.default": 2, "permute.default": 1, "clone.default": 1}


def test_a_constant_that_is_too_large_is_made_at_run_time_from_a_folded_one() -> None:
    module, _ = run(lambda self, x: x.sum() + self.vector.exp()[:, None, None].expand(4, 200, 200))
    assert "exp.default" not in operators(module)
    assert "expand.default" in operators(module)


def test_what_takes_computing_is_folded_even_if_it_is_larger_than_what_it_is_made_of() -> None:
    # The attention that relative positions alone give, as in ConViT.
    place = torch.arange(200.0)

    def biased(self: Function, x: torch.Tensor) -> torch.Tensor:
        return x.sum() + (self.vector[0] * (place[:, None] - place).abs()).softmax(-1)

    model = Function(biased).eval()
    module = capture(model, (X,)).graph_module
    PassManager([Canonicalize()], verify_each=True).run(module, PassContext(example_inputs=(X,)))
    assert operators(module) == ["sum.default", "add.Tensor"]
    module = capture(model, (X,)).graph_module
    context = PassContext()
    PassManager([Canonicalize(computed_limit_bytes=1 << 10)]).run(module, context)
    assert "softmax.int" in operators(module)
    assert any("the constant would have 160000 bytes" in note.message for note in context.notes)


def attention(self: Function, x: torch.Tensor, **options: Any) -> torch.Tensor:
    """Over 4 tokens of 2 images; stored with the heads behind the tokens, as the operator does."""
    q, k, v = x.reshape(2, 4, 4, 16).permute(0, 2, 1, 3).mul(torch.ones(3, 1, 1, 1, 1)).unbind(0)
    return functional.scaled_dot_product_attention(q, k, v, **options)


def test_attention_becomes_products_and_a_softmax() -> None:
    module, _ = run(attention)
    assert Counter(operators(module))["matmul.default"] == 2
    assert "softmax.int" in operators(module)
    module, _ = run(lambda self, x: attention(self, x, attn_mask=self.vector.expand(4, 4), scale=0.5).relu())
    assert "scaled_dot_product_attention.default" not in operators(module)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_causal": True}, "its mask is causal"),
        ({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "its mask is not added"),
        ({"enable_gqa": True}, "its heads share keys"),
    ],
)
def test_other_attention_stays_whole(options: dict[str, Any], reason: str) -> None:
    module, context = run(lambda self, x: attention(self, x, **options))
    assert "scaled_dot_product_attention.default" in operators(module)
    assert reason in {note.message for note in context.notes}


def test_attention_over_one_matrix_stays_whole() -> None:
    module, context = run(lambda self, x: functional.scaled_dot_product_attention(x[0, 0], x[0, 1], x[0, 2]))
    assert operators(module).count("scaled_dot_product_attention.default") == 1
    assert "it is one matrix" in {note.message for note in context.notes}


def test_assertions_are_dropped() -> None:
    module = capture(nn.ReLU(), (X,)).graph_module
    (placeholder,) = module.graph.find_nodes(op="placeholder")
    with module.graph.inserting_after(placeholder):
        module.graph.call_function(aten._assert_tensor_metadata.default, (placeholder,)).meta["val"] = None
    PassManager([Canonicalize()]).run(module, PassContext())
    assert operators(module) == ["relu.default"]


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    def block(self: Function, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu6(conv(self, functional.pad(x, (1, 1, 1, 1))))
        first, second = functional.dropout(y, 0.5, False).chunk(2, 1)
        return functional.adaptive_avg_pool2d(first + self.vector[:3].exp().view(-1, 1, 1) * second, 1).flatten(1)

    before = capture(Function(block).eval(), (X,)).graph_module
    after, _ = run(block)
    texts = [print_graph(module, sources=False) for module in (before, after)]
    golden("passes/canonicalize", "# before\n{}\n# after\n{}".format(*texts))
