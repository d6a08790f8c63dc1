"""A captured graph as an exported program again, which takes and gives what the user's model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sepc.frontend.export import Captured


def as_program(captured: Captured, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """The program of the graph of `captured`, with these arguments, which it was captured with, as its examples."""
    with torch.no_grad():
        return torch.export.export(_Whole(captured), tuple(args), dict(kwargs))


class _Whole(nn.Module):
    """The graph between the user's structures."""

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.graph_module, self._captured = captured.graph_module, captured

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's model computes."""
        return self._captured.unflatten(self.graph_module(*self._captured.flatten(args, kwargs)))
