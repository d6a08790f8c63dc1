"""A stack of 1-D separable convolutions over time, as in the predictors of TalkNet (Beliaev et al., 2020).

Blocks of five separable convolutions, each a depthwise one along time and a pointwise one with batch normalisation,
between ReLUs; a pointwise residual connection around each block; kernels that grow from block to block.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import agrees_in_stages_of_ours

SYMBOLS, MEL_BANDS = 43, 80
KERNELS = (5, 9, 13, 25, 31)


def separable(channels: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv1d(channels, channels, kernel, stride, padding, dilation, channels, bias=False),
        nn.Conv1d(channels, outputs, 1, bias=False),
        nn.BatchNorm1d(outputs),
    )


class Block(nn.Module):
    def __init__(self, channels: int, outputs: int, kernel: int, repeats: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(repeats):
            layers += [separable(channels if index == 0 else outputs, outputs, kernel), nn.ReLU(), nn.Dropout(0.1)]
        self.main = nn.Sequential(*layers[:-2])
        self.residual = nn.Sequential(nn.Conv1d(channels, outputs, 1, bias=False), nn.BatchNorm1d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.main(x) + self.residual(x))


class TalkNet(nn.Module):
    def __init__(self, channels: int = 128, repeats: int = 3) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, 64)
        self.stem = nn.Sequential(separable(64, channels, 3), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(channels, channels, kernel, repeats) for kernel in KERNELS))
        self.end = nn.Sequential(separable(channels, channels, 1, dilation=2), nn.ReLU())
        self.head = nn.Conv1d(channels, MEL_BANDS, 1)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Mel bands [N, 80, T] of symbols [N, T], already repeated as often as they last."""
        bands: torch.Tensor = self.head(self.end(self.blocks(self.stem(self.symbols(text).transpose(1, 2)))))
        return bands


@pytest.mark.parametrize(("batch", "length"), [(1, 203), (2, 64)])
def test_agrees_with_eager(batch: int, length: int) -> None:
    agrees_in_stages_of_ours(TalkNet(), torch.randint(0, SYMBOLS, (batch, length)), foreign=("embedding",))
