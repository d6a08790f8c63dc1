"""DS-CNN, the keyword spotter of "Hello Edge: Keyword Spotting on Microcontrollers" (Zhang et al., 2017), sizes S to L.

49 frames of 10 MFCC coefficients; a convolution 10×4, then depthwise separable ones 3×3, each followed by batch
normalisation and ReLU; the average over time and frequency; one linear layer to 12 keywords.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sepc
from tests.helpers import agrees_in_stages_of_ours

FRAMES, COEFFICIENTS, KEYWORDS = 49, 10, 12
# Channels, strides of the first convolution and of the first separable one, number of separable ones.
SIZES = {
    "S": (64, (2, 2), (1, 1), 4),
    "M": (172, (2, 1), (2, 2), 4),
    "L": (276, (2, 1), (2, 2), 5),
}


def separable(channels: int, stride: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class DsCnn(nn.Module):
    def __init__(self, size: str) -> None:
        super().__init__()
        channels, stem_stride, stride, count = SIZES[size]
        # TensorFlow's "same" padding, which the paper used: the odd one behind.
        self.stem = nn.Sequential(
            nn.ZeroPad2d((1, 2 if stem_stride[1] == 1 else 1, 4, 5)),
            nn.Conv2d(1, channels, (10, 4), stem_stride, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        strides = [stride] + [(1, 1)] * (count - 1)
        self.body = nn.Sequential(*(separable(channels, one) for one in strides))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(channels, KEYWORDS))

    def forward(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Scores [N, 12] of MFCC coefficients [N, 49, 10]."""
        scores: torch.Tensor = self.head(self.body(self.stem(coefficients[:, None])))
        return scores


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_eager(size: str) -> None:
    agrees_in_stages_of_ours(DsCnn(size), torch.randn(2, FRAMES, COEFFICIENTS))


def test_the_small_one_works_in_64_kib() -> None:
    options: dict[str, Any] = {"target": "arm64", "num_threads": 1, "optimize": "memory"}
    compiled = sepc.compile(DsCnn("S").eval(), example_inputs=(torch.randn(1, FRAMES, COEFFICIENTS),), **options)
    assert compiled.arena_bytes <= 64 * 1024
