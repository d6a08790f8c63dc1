"""Segment a photograph with DeepLabV3 on MobileNetV3, the atrous pyramid dense and separable, by PyTorch and sepc.

    python examples/segment.py [--size N] [--threads N] [--rounds N]

An atrous (dilated) convolution sees far with few weights. The pyramid of DeepLabV3 has three dense ones of 3×3, with
960 channels in and 256 out; DeepLabV3+ (Chen et al., 2018) makes each of them separable: a depthwise atrous one, then a
pointwise one. Both are run here, on the backbone of torchvision, which has atrous depthwise layers itself.

No trained weights are at hand without a download, so the weights are random, with batch normalisation as the photograph
demands, and the classes mean nothing. Prints for both whether PyTorch and sepc agree (all values, and the class of each
pixel), both latencies, and what becomes of the atrous layers. The exit status is 1 if they disagree.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import data
from torch import nn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import sepc
from sepc.ir.layers import Conv
from sepc.ir.region import computations, regions

TOLERANCE: Final = 1e-4
CLASSES: Final = 21
PHOTOGRAPH: Final[Callable[[], npt.NDArray[np.uint8]]] = data.astronaut


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if sepc agrees with PyTorch on both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="side of the image in pixels (default 320)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both (default 1)")
    parser.add_argument("--rounds", type=int, default=10, help="calls of each, for the latencies")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    image = photograph(options.size)
    agreed = []
    for pyramid in ("dense", "separable"):
        model = network(separable=pyramid == "separable")
        settle(model, image)
        print(f"DeepLabV3 on MobileNetV3, {pyramid} pyramid, {options.size}×{options.size}, random weights:")
        agreed.append(compare(model, image, options.rounds))
    return 0 if all(agreed) else 1


def network(separable: bool) -> nn.Module:
    """DeepLabV3 without an auxiliary head; with every dense atrous layer made separable, if that is asked for."""
    torch.manual_seed(0)
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    if separable:
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.dilation != (1, 1):
                    setattr(parent, name, atrous_separable(layer))
    return Segmenter(model)


class Segmenter(nn.Module):
    """A segmentation model of torchvision that takes images [N, 3, H, W] and gives logits [N, classes, H, W] alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits."""
        logits: torch.Tensor = self.model(images)["out"]
        return logits


def atrous_separable(dense: nn.Conv2d) -> nn.Sequential:
    """What DeepLabV3+ has in the place of a dense atrous convolution of 3×3 and stride 1 that keeps the size."""
    channels, rate = dense.in_channels, dense.dilation[0]
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, dense.out_channels, 1, bias=False),
    )


def settle(model: nn.Module, image: torch.Tensor) -> None:
    """Give batch normalisation the statistics of this image and its mirror image, so that no layer is dead."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.cat([image, image.flip(3)]))
    model.eval().requires_grad_(False)


def photograph(size: int) -> torch.Tensor:
    """A photograph [1, 3, size, size], with the mean and the deviation of ImageNet taken out."""
    pixels = np.array(Image.fromarray(PHOTOGRAPH()).resize((size, size), Image.Resampling.BICUBIC))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    mean, deviation = (torch.tensor(one).view(1, 3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (image - mean) / deviation


def compare(model: nn.Module, image: torch.Tensor, rounds: int) -> bool:
    """Print what both say and how long they take; whether they agree."""
    fast = sepc.compile(model)
    with torch.inference_mode():
        reference, result = model(image), fast(image)
        times_s = [timeit.repeat(functools.partial(run, image), number=1, repeat=rounds) for run in (model, fast)]
    eager_ms, fast_ms = (1e3 * statistics.median(one) for one in times_s)
    difference = float((result - reference).abs().max() / reference.abs().max())
    same = float((result.argmax(1) == reference.argmax(1)).float().mean())
    is_right = difference <= TOLERANCE
    print(f"  largest difference {difference:.1e} of the largest value: they {'agree' if is_right else 'DISAGREE'}")
    print(f"  the same class at {100 * same:.3f} % of the pixels")
    print(f"  PyTorch {eager_ms:.1f} ms, sepc {fast_ms:.1f} ms, {eager_ms / fast_ms:.2f} times as fast")
    measured_us = {row.name: row.measured_us for row in fast.profile(image)}
    for name, layers in atrous_layers(fast).items():
        print(f"  {measured_us[name] / 1e3:6.2f} ms  {name}: {', '.join(layers)}")
    return is_right


def atrous_layers(fast: sepc.CompiledModel) -> Mapping[str, list[str]]:
    """The regions of a compiled model with atrous convolutions, and what these are."""
    found: dict[str, list[str]] = {}
    for region, graph in regions(fast.graph_module):
        for node in computations(graph):
            if Conv.matches(node) and max((conv := Conv.of(node)).dilation) > 1:
                kind = "depthwise" if conv.is_depthwise else "dense"
                text = f"{kind} {conv.in_channels} → {conv.out_channels}, dilation {conv.dilation[0]}"
                found.setdefault(region.name, []).append(text)
    return found


if __name__ == "__main__":
    sys.exit(main())
