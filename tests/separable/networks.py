"""Small networks whose convolutions can be made separable, and data with structure, as images have."""

from __future__ import annotations

import torch
from torch import fx, nn

from sepc.frontend.export import capture
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.manager import PassContext, PassManager
from tests.helpers import with_statistics


class Block(nn.Module):
    """A residual block whose skip is computed after its branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.second(torch.relu(self.norm(self.first(x))))
        return torch.relu(branch + self.skip(x))


def network(channels: int = 16) -> nn.Module:
    """A stem with a normalisation, a residual block, a layer of stride 2, and a classifier."""
    return with_statistics(
        nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            Block(channels),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * channels, 5),
        )
    )


def smooth_images(count: int, channels: int = 3, size: int = 12) -> torch.Tensor:
    """Images in which neighbouring pixels are alike."""
    noise = torch.randn(count, channels, size + 4, size + 4)
    return 3 * nn.functional.avg_pool2d(noise, 5, 1)


def graph_of(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """The canonical graph of `model`."""
    graph_module = capture(model, (example,)).graph_module
    PassManager([Canonicalize()]).run(graph_module, PassContext())
    return graph_module
