"""An optimised graph as an exported program takes and gives what the model does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sepc.frontend.export import capture
from sepc.frontend.program import as_program
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE
from sepc.target import Target
from tests.helpers import with_statistics


class Nested(nn.Module):
    """Arguments and results in structures, by position and by name, and some that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, pair: list[torch.Tensor], factor: float, *, shift: torch.Tensor) -> dict[str, object]:
        first, second = pair
        return {"sum": self.layers(first + second) * factor, "rest": (shift + 1, None, [first])}


def test_it_is_saved_and_gives_the_same_results(tmp_path: Path) -> None:
    model = with_statistics(Nested())
    args, kwargs = ([torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)], 2.0), {"shift": torch.randn(5)}
    captured = capture(model, args, kwargs)
    context = PassContext(machine=Target.parse("x86-64-v3").machine)
    PassManager(PIPELINE).run(captured.graph_module, context)
    torch.export.save(as_program(captured, args, kwargs), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    torch.testing.assert_close(program.module()(*args, **kwargs), model(*args, **kwargs))
    assert "batch_norm" not in program.graph_module.code


def test_arguments_are_found_again_from_the_inputs_of_the_graph() -> None:
    args, kwargs = ([torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)], 2.0), {"shift": torch.randn(5)}
    captured = capture(Nested().eval(), args, kwargs)
    found_args, found_kwargs = captured.arguments(captured.flatten(args, kwargs))
    assert found_args[1:] == args[1:]
    assert all(one is other for one, other in zip(found_args[0], args[0], strict=True))
    assert found_kwargs["shift"] is kwargs["shift"]
