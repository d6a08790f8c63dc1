"""The decoder of a video autoencoder of 3-D separable convolutions, in the manner of Xception's blocks in 3-D
("Rethinking Spatiotemporal Feature Learning", Xie et al., 2018; 3-D MobileNets of Köpüklü et al., 2019).

From a latent volume, each stage doubles time, height and width by a transposed convolution, and refines by residual
blocks of a depthwise 3×3×3 and a pointwise convolution, with batch normalisation.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.helpers import agrees_in_stages_of_ours


class SeparableBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm3d(channels),
            nn.SiLU(),
            nn.Conv3d(channels, channels, 1, bias=False),
            nn.BatchNorm3d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x + self.layers(x))


def upward(channels: int, outputs: int, depthwise: bool) -> nn.Sequential:
    """Twice the planes, rows and columns: dense, or depthwise and then pointwise."""
    if depthwise:
        layers = [
            nn.ConvTranspose3d(channels, channels, 4, 2, 1, groups=channels, bias=False),
            nn.Conv3d(channels, outputs, 1, bias=False),
        ]
    else:
        layers = [nn.ConvTranspose3d(channels, outputs, 3, 2, 1, output_padding=1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm3d(outputs), nn.SiLU())


class Decoder(nn.Module):
    def __init__(self, latent: int = 16, channels: tuple[int, ...] = (64, 32, 16), depthwise: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv3d(latent, channels[0], 1), SeparableBlock(channels[0])]
        for inputs, outputs in itertools.pairwise(channels):
            layers += [upward(inputs, outputs, depthwise), SeparableBlock(outputs), SeparableBlock(outputs)]
        self.layers = nn.Sequential(*layers, nn.Conv3d(channels[-1], 3, 3, padding=1), nn.Sigmoid())

    def forward(self, mean: torch.Tensor, deviation: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A video [N, 3, 4·T, 4·H, 4·W] of a latent volume [N, 16, T, H, W]."""
        video: torch.Tensor = self.layers(mean + deviation * noise)
        return video


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_agrees_with_eager(depthwise: bool, batch: int) -> None:
    volumes = [torch.randn(batch, 16, 2, 5, 4) for _ in range(3)]
    agrees_in_stages_of_ours(Decoder(depthwise=depthwise), *volumes)
