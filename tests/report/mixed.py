"""A model of which sepc, TVM and PyTorch each compute a part."""

from __future__ import annotations

import torch
from torch import nn

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Two convolutions of ours, a product that PyTorch runs, a logarithm of a softmax that TVM lowers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.norm(self.first(x)).relu()).flatten(2)  # the convolutions
        z = torch.baddbmm(torch.ones(1, 8, 8), y, y.transpose(1, 2))  # the product
        return z.log_softmax(1)
