"""Fashion-MNIST, 60,000 images to train with and 10,000 to test with, from Debian's package."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

DEFAULT_FOLDER: Final = Path("/usr/share/datasets/fashion-mnist")
FOLDER_VARIABLE: Final = "SEPC_FASHION_MNIST"
# Of the pixels of the training images, between 0 and 1.
MEAN, DEVIATION = 0.2860, 0.3530


class MissingDataError(Exception):
    """The data set is not where it should be; the message says how to get it."""


@dataclass(frozen=True)
class Images:
    """Normalised images [N, 1, 28, 28] and their classes [N]."""

    images: torch.Tensor
    labels: torch.Tensor


def load(train: bool, folder: Path | None = None) -> Images:
    """The training or the test images; raises MissingDataError where there are none."""
    folder = folder or Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER))
    stem = "train" if train else "t10k"
    pixels = _read(folder / f"{stem}-images-idx3-ubyte.gz", header_bytes=16).reshape(-1, 1, 28, 28)
    labels = _read(folder / f"{stem}-labels-idx1-ubyte.gz", header_bytes=8)
    images = (pixels.float() / 255 - MEAN) / DEVIATION
    return Images(images, labels.long())


def _read(path: Path, header_bytes: int) -> torch.Tensor:
    if not path.exists():
        raise MissingDataError(
            f"There is no {path}.\n  What to do: apt install dataset-fashion-mnist (Debian, Ubuntu), or unpack that "
            f"package elsewhere, and name the folder with the four files in the variable {FOLDER_VARIABLE}"
        )
    with gzip.open(path) as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header_bytes).copy())
