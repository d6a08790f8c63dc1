"""The two networks: layers of 64 to 256 channels, with and without residual connections; trained with fixed seeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import nn

from benchmarks.separate.data import Images, load

CLASSES: Final = 10
EPOCHS: Final = 5
BATCH: Final = 128
PEAK_RATE: Final = 0.1
MOMENTUM: Final = 0.9
WEIGHT_DECAY: Final = 5e-4
LABEL_SMOOTHING: Final = 0.1
SHIFT_PIXELS: Final = 1
# Of images at a time, when accuracy is measured.
TEST_BATCH: Final = 500


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution and its batch normalisation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


def vgg() -> nn.Module:
    """Five 3×3 convolutions with batch normalisation, in three stages of 64, 128 and 256 channels."""
    layers: list[nn.Module] = []
    channels = 1
    for width, count in ((64, 1), (128, 2), (256, 2)):
        for _ in range(count):
            layers += [*convolution(channels, width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Residual(nn.Module):
    """The basic block: two 3×3 convolutions beside the identity, or beside a 1×1 one where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *convolution(inputs, outputs, stride=stride), nn.ReLU(inplace=True), *convolution(outputs, outputs)
        )
        changes = stride != 1 or inputs != outputs
        self.skip = nn.Sequential(*convolution(inputs, outputs, 1, stride)) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.skip(x))


def resnet() -> nn.Module:
    """A stem, pooling, and two basic blocks in each of three stages of 64, 128 and 256 channels."""
    layers: list[nn.Module] = [*convolution(1, 64), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    channels = 64
    for width in (64, 128, 256):
        layers += [Residual(channels, width, 1 if width == channels else 2), Residual(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


NETWORKS: Final[dict[str, Callable[[], nn.Module]]] = {"vgg": vgg, "resnet": resnet}


def trained(name: str, seed: int, folder: Path) -> nn.Module:
    """The network of that name, trained with `seed`, in eval mode; kept in `folder` for the next time."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    path = folder / f"{name}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, load(train=True), seed, label=f"{name}, seed {seed}")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval()


def train(model: nn.Module, data: Images, seed: int, label: str) -> None:
    """Train `model` by stochastic gradient descent."""
    generator = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), PEAK_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = EPOCHS * (len(data.images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.25)
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    for epoch in range(EPOCHS):
        begin_s, total = time.perf_counter(), 0.0
        order = torch.randperm(len(data.images), generator=generator)
        for rows in torch.split(order[: len(order) // BATCH * BATCH], BATCH):
            images = augment(data.images[rows], generator).contiguous(memory_format=torch.channels_last)
            loss = loss_of(model(images), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        seconds = time.perf_counter() - begin_s
        print(f"{label}: epoch {epoch + 1}/{EPOCHS}, loss {total / len(order):.3f}, {seconds:.0f} s", flush=True)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`images`, some of them mirrored, all shifted by at most `SHIFT_PIXELS`."""
    flipped = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flipped, images.flip(3), images)
    padded = nn.functional.pad(images, (SHIFT_PIXELS,) * 4, value=float(images.min()))
    down, right = torch.randint(0, 2 * SHIFT_PIXELS + 1, (2,), generator=generator).tolist()
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


def accuracy(model: Callable[[torch.Tensor], torch.Tensor], data: Images) -> float:
    """The share of `data` that `model` classifies rightly, in percent."""
    with torch.inference_mode():
        hits = sum(
            int(torch.eq(model(images).argmax(1), labels).sum())
            for images, labels in zip(
                torch.split(data.images, TEST_BATCH), torch.split(data.labels, TEST_BATCH), strict=True
            )
        )
    return 100 * hits / len(data.images)
