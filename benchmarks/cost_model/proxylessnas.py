"""ProxylessNAS (Mobile), which timm does not have: Cai et al., arXiv 1812.00332, figure 4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import nn

STAGES: Final = (
    # channels, stride of the first block, (kernel size, expansion) of each
    (16, 1, ((3, 1),)),
    (32, 2, ((5, 3), (3, 3))),
    (40, 2, ((7, 3), (3, 3), (5, 3), (5, 3))),
    (80, 2, ((7, 6), (5, 3), (5, 3), (5, 3))),
    (96, 1, ((5, 6), (5, 3), (5, 3), (5, 3))),
    (192, 2, ((7, 6), (7, 6), (7, 3), (7, 3))),
    (320, 1, ((7, 6),)),
)
STEM: Final = 32
FEATURES: Final = 1280


def _layer(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; and the input, where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = [*_layer(inputs, inner), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_layer(inner, inner, kernel, stride, inner), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, *_layer(inner, outputs))
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.is_residual else y


def _blocks() -> Iterator[nn.Module]:
    inputs = STEM
    for outputs, stride, blocks in STAGES:
        for index, (kernel, expansion) in enumerate(blocks):
            yield InvertedResidual(inputs, outputs, kernel, stride if index == 0 else 1, expansion)
            inputs = outputs


def proxylessnas() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network in eval mode, with reproducible random parameters, and its input, [1, 3, 224, 224]."""
    torch.manual_seed(0)
    stem, head = [*_layer(3, STEM, 3, 2), nn.ReLU6()], [*_layer(STAGES[-1][0], FEATURES), nn.ReLU6()]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FEATURES, 1000)]
    return nn.Sequential(*stem, *_blocks(), *head, *tail).eval(), (torch.rand(1, 3, 224, 224),)
