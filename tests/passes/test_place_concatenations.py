"""place-concatenations: parts are written in place where that is legal, and the reason is given where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import sepc
from sepc.ir import region
from sepc.ir.layout import layout
from sepc.passes.manager import PassContext
from tests.helpers import Function, passes_until

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
LAST = X.contiguous(memory_format=torch.channels_last)


def model(function: Callable[..., Any]) -> Function:
    return Function(function, conv=nn.Conv2d(4, 4, 3, padding=1), point=nn.Conv2d(4, 3, 1)).eval()


def placed(function: Callable[..., Any]) -> tuple[fx.Node, list[fx.Node], PassContext]:
    """The last concatenation, the values that are written into it, and the context."""
    module, context = passes_until("place-concatenations", model(function), LAST)
    nodes = [node for node, _ in region.regions(module)]
    cat = [node for node in nodes if region.info(node).kind == "concatenation"][-1]
    return cat, [node for node in nodes if node is not cat and layout(node).base is cat], context


def test_parts_lie_one_after_the_other_in_the_concatenation() -> None:
    cat, parts, _ = placed(lambda self, x: torch.cat([self.conv(x), x, self.point(x).relu()], 1).exp())
    assert [layout(part).offset for part in parts] == [0, 8]
    assert {layout(part).strides for part in parts} == {layout(cat).strides}


def twice(self: Function, x: torch.Tensor) -> torch.Tensor:
    y = self.conv(x)
    return torch.cat([y, y], 1).exp()


def result_too(self: Function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = self.conv(x).permute(0, 1, 2, 3).relu()
    return torch.cat([y, x], 1).exp(), y[:, 1:]


def nested(self: Function, x: torch.Tensor) -> torch.Tensor:
    inner = torch.cat([self.conv(x), x], 1)
    return torch.cat([inner, x], 1).exp()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (twice, "it occurs twice"),
        (result_too, "there are views of it"),
        (nested, "a concatenation itself"),
        (lambda self, x: torch.cat([x, self.conv(x)], 1).exp(), "not the result of a region"),
        (lambda self, x: torch.cat([self.conv(x), x.log_softmax(1)], 1).exp(), "computed by torch, densely"),
    ],
)
def test_what_cannot_be_written_in_place_says_why(function: Callable[..., Any], reason: str) -> None:
    _, _, context = placed(function)
    assert any(reason in note.message for note in context.notes if note.pass_name == "place-concatenations")


@pytest.mark.parametrize("x", [X, LAST], ids=["NCHW", "NHWC"])
def test_concatenations_are_right_however_their_parts_are_written(x: torch.Tensor) -> None:
    def dense(self: Function, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.conv(x).relu()
        second = self.conv(torch.cat([first, x], 1)[:, 2:6])
        both = torch.cat([first, second, self.point(second)], 1)
        return [both, nested(self, x), twice(self, x), *result_too(self, x), torch.cat([first, second], 2) * 2]

    reference = model(dense)
    for _ in range(2):
        for actual, expected in zip(sepc.compile(reference)(x), reference(x), strict=True):
            torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-4)
