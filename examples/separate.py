"""Train a small network of dense convolutions, make it separable, and draw accuracy against measured latency.

    python examples/separate.py [--output separate.svg] [--threads N] [--speedups 1.5 3] [--train-steps N]
                                [--distill-steps N]

The task: which of eight photographs and textures (of scikit-image, which carries them) a crop of 32×32 pixels is from.
The network learns from crops of the left part of each, and is tested on crops of the rest. `sepc.separate` then makes
it separable for each speed-up, from crops without labels; once by a fit alone, and once with distillation behind it.
Takes some two minutes on two cores. The exit status is 1 if a compiled network does not compute what PyTorch does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from skimage import data
from skimage.color import rgb2gray
from torch import nn

import sepc
from sepc.report.plots import save
from sepc.report.tradeoff import Curve, draw_tradeoff

PICTURES: Final = ("brick", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "page", "text")
CROP: Final = 32
# How much of each picture is for training, from the left.
TRAINED_SHARE: Final = 0.7
BATCH: Final = 64
TESTED: Final = 2048
CALIBRATION: Final = 2048
TOLERANCE: Final = 1e-4


@dataclass(frozen=True)
class Point:
    """One network: how it was fitted, its accuracy in percent, and its measured latency in microseconds."""

    label: str
    accuracy: float
    latency_us: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if the compiled networks agree with PyTorch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("separate.svg"), help="the plot")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of training and of what is measured (default 1)"
    )
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 3.0])
    parser.add_argument("--train-steps", type=int, default=250)
    parser.add_argument("--distill-steps", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pictures = load_pictures()
    model = train(pictures, options.train_steps)
    images, labels = crops(pictures, TESTED, trained=False)
    calibration, _ = crops(pictures, CALIBRATION, trained=True)
    points: list[Point] = []
    for speedup in options.speedups:
        for steps in sorted({0, options.distill_steps}):
            result = sepc.separate(model, calibration=calibration, speedup=speedup, distill_steps=steps)
            if result.measured_us is None:
                print(f"{speedup:g} times as fast: {result.reason}")
                continue
            if not agrees(result.model, images[:1]):
                print("The compiled network does not compute what PyTorch does.", file=sys.stderr)
                return 1
            before_us, after_us = result.measured_us
            if not points:
                points.append(Point("dense", accuracy(model, images, labels), before_us))
            label = f"distilled for {steps} steps" if steps else "fitted"
            points.append(
                Point(label, accuracy(result.model, images, labels), after_us * points[0].latency_us / before_us)
            )
            print(result, end="\n\n")
    points = points or [Point("dense", accuracy(model, images, labels), 0.0)]
    for point in points:
        print(f"{point.label:26} {point.accuracy:6.2f} % right, {point.latency_us:7.1f} µs")
    draw(points, options.output)
    print(f"Drawn to {options.output}")
    return 0


def load_pictures() -> list[torch.Tensor]:
    """The pictures in grey [H, W], of mean 0 and deviation 1: brightness shall not tell them apart."""
    pictures = []
    for name in PICTURES:
        pixels = torch.tensor(getattr(data, name)()).float()
        grey = torch.tensor(rgb2gray(pixels.numpy())).float() if pixels.dim() == 3 else pixels
        pictures.append((grey - grey.mean()) / grey.std())
    return pictures


def crops(pictures: Sequence[torch.Tensor], count: int, trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """So many crops [N, 1, 32, 32] at random places of the part that is trained with, or of the rest; and whose."""
    labels = torch.arange(count) % len(pictures)
    images = torch.empty(count, 1, CROP, CROP)
    for index, label in enumerate(labels.tolist()):
        height, width = pictures[label].shape
        border = int(TRAINED_SHARE * width)
        left, right = (0, border - CROP) if trained else (border, width - CROP)
        row, column = int(torch.randint(0, height - CROP + 1, ())), int(torch.randint(left, right + 1, ()))
        images[index, 0] = pictures[label][row : row + CROP, column : column + CROP]
    return images, labels


def network() -> nn.Module:
    """Four dense 3×3 convolutions of 32 to 96 channels, with batch normalisation."""
    layers: list[nn.Module] = []
    channels = 1
    for width, pooled in ((32, False), (64, True), (64, False), (96, True)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(PICTURES)))


def train(pictures: Sequence[torch.Tensor], steps: int) -> nn.Module:
    """The network, trained on new crops at every step."""
    model = network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        images, labels = crops(pictures, BATCH, trained=True)
        loss = nn.functional.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of `images` that `model` tells rightly, in percent."""
    with torch.no_grad():
        found = torch.cat([model(some).argmax(1) for some in torch.split(images, 256)])
    return 100 * float((found == labels).float().mean())


def agrees(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether sepc computes what PyTorch does."""
    with torch.no_grad():
        expected = model(x)
    return float((sepc.compile(model)(x) - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def draw(points: Sequence[Point], path: Path) -> None:
    """Accuracy against latency, a line for each way of fitting."""
    dense, *others = points
    curves = [
        Curve(label, [(dense.latency_us / one.latency_us, one.accuracy) for one in others if one.label == label])
        for label in dict.fromkeys(point.label for point in others)
    ]
    save(lambda figure: draw_tradeoff(figure.subplots(), dense.accuracy, curves, "right, %"), path)


if __name__ == "__main__":
    sys.exit(main())
