"""3-D U-Net (Çiçek et al., 2016) with inverted bottlenecks (MobileNetV2, Sandler et al., 2018) in place of pairs of
convolutions: downwards by a stride of 2 or by pooling, upwards by transposed convolutions, and concatenations across.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.helpers import agrees_in_stages_of_ours


class InvertedBottleneck(nn.Module):
    def __init__(self, channels: int, outputs: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        inner = channels * expansion
        self.adds = stride == 1 and channels == outputs
        self.layers = nn.Sequential(
            nn.Conv3d(channels, inner, 1, bias=False),
            nn.BatchNorm3d(inner),
            nn.ReLU6(),
            nn.Conv3d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm3d(inner),
            nn.ReLU6(),
            nn.Conv3d(inner, outputs, 1, bias=False),
            nn.BatchNorm3d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x)
        return x + result if self.adds else result


class UNet(nn.Module):
    def __init__(self, channels: tuple[int, ...] = (8, 16, 32), classes: int = 3, pools: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(1, channels[0], 3, padding=1, bias=False), nn.BatchNorm3d(channels[0]), nn.ReLU()
        )
        steps = list(itertools.pairwise(channels))
        self.across = nn.ModuleList(InvertedBottleneck(one, one) for one in channels)
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool3d(2), InvertedBottleneck(fine, coarse))
            if pools
            else InvertedBottleneck(fine, coarse, 2)
            for fine, coarse in steps
        )
        self.up = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, 2) for fine, coarse in steps)
        self.join = nn.ModuleList(InvertedBottleneck(2 * fine, fine, expansion=2) for fine, _ in steps)
        self.head = nn.Conv3d(channels[0], classes, 1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Scores [N, classes, D, H, W] of the voxels of a volume [N, 1, D, H, W], whose sides divide by 4."""
        levels = [self.across[0](self.stem(volume))]
        for down, across in zip(self.down, list(self.across)[1:], strict=True):
            levels.append(across(down(levels[-1])))
        value = levels.pop()
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            value = join(torch.cat([levels.pop(), up(value)], 1))
        scores: torch.Tensor = self.head(value)
        return scores


@pytest.mark.parametrize(("pools", "batch"), [(False, 1), (True, 2)])
def test_agrees_with_eager(pools: bool, batch: int) -> None:
    agrees_in_stages_of_ours(UNet(pools=pools), torch.randn(batch, 1, 8, 16, 12))
