"""Second moments of what a convolution reads and of what it should give, from patches at random places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from sepc.errors import InputError
from sepc.separable.geometry import Geometry

# Patches per entry of a patch: with few of them the covariance is near singular, and fits follow the sample.
PATCHES_PER_ENTRY: Final = 10
FEWEST_PATCHES: Final = 4096
# Added to the diagonals, relative to their mean.
REGRESSION_RIDGE: Final = 1e-3
METRIC_FLOOR: Final = 1e-5


@dataclass(frozen=True)
class Statistics:
    """Moments by group, in float64: of patches p [I·taps] and targets t [O].

    Attributes:
        patch_mean: [groups, I·taps]. target_mean: [groups, O].
        covariance: of patches, [groups, I·taps, I·taps].
        cross: of targets with patches, [groups, O, I·taps].
        variance: of targets, summed over channels.
        count: how many patches they are of, in each group.
    """

    patch_mean: torch.Tensor
    target_mean: torch.Tensor
    covariance: torch.Tensor
    cross: torch.Tensor
    variance: float
    count: int

    def metric(self) -> torch.Tensor:
        """The covariance, with something on the diagonal for inputs that are dead in the sample."""
        return self.covariance + METRIC_FLOOR * self._mean_diagonal()

    def best_weight(self, weight: torch.Tensor, ridge: float = REGRESSION_RIDGE) -> torch.Tensor:
        """The weight that gives the targets best, W + (G − W S)(S + λ)⁻¹ [O, I, k...]: W where p tells nothing.

        λ is `ridge` times the mean of the diagonal of S.
        """
        rows = weight.detach().double().reshape(len(self.cross), -1, self.cross.shape[2])
        missing = self.cross - rows @ self.covariance
        root = torch.linalg.cholesky(self.covariance + ridge * self._mean_diagonal())
        return (rows + torch.cholesky_solve(missing.transpose(1, 2), root).transpose(1, 2)).reshape(weight.shape)

    def bias(self, weight: torch.Tensor) -> torch.Tensor:
        """The bias [O] with which `weight` gives the right means."""
        rows = weight.reshape(len(self.cross), -1, self.cross.shape[2])
        return (self.target_mean - (rows @ self.patch_mean[..., None])[..., 0]).flatten()

    def error(self, weight: torch.Tensor) -> float:
        """The relative error of results by `weight` and its `bias`, as a root of mean squares."""
        rows = weight.detach().double().reshape(len(self.cross), -1, self.cross.shape[2])
        left = self.variance - 2 * float((rows * self.cross).sum()) + float((rows @ self.covariance * rows).sum())
        return math.sqrt(max(0.0, left) / self.variance) if self.variance > 0 else 0.0

    def _mean_diagonal(self) -> torch.Tensor:
        """For each group the identity times the mean of its diagonal; times 1 where all inputs are dead."""
        means = self.covariance.diagonal(dim1=1, dim2=2).mean(1)
        means = torch.where(means > 0, means, torch.ones_like(means))
        return means[:, None, None] * torch.eye(self.covariance.shape[1]).to(means)


class Sampler:
    """Gathers the moments of a layer, batch by batch.

    Args:
        geometry: of the layer, with padding as numbers.
        images: how many there will be.
        size: of an image, in pixels.
        generator: of places.
    """

    def __init__(self, geometry: Geometry, images: int, size: tuple[int, ...], generator: torch.Generator) -> None:
        self._geometry, self._generator = geometry, generator
        self._entries = geometry.group_inputs * geometry.taps
        wanted = max(FEWEST_PATCHES, PATCHES_PER_ENTRY * self._entries)
        self._places = math.prod(geometry.output_size(size))
        self._per_image = min(self._places, math.ceil(wanted / images))
        self._taps = _tap_indices(geometry, size)
        self._count = 0
        self._shifts: tuple[torch.Tensor, torch.Tensor] | None = None

    def places(self) -> torch.Tensor:
        """Places in the result, as indices into its pixels, for the next batch."""
        return torch.randperm(self._places, generator=self._generator)[: self._per_image]

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> None:
        """Take the patches of `inputs` [N, I, pixels...] at `places`, and the `targets` [N, O, places] there."""
        geometry = self._geometry
        assert not isinstance(geometry.padding, str), "graphs have numbers"
        pads = [amount for pad in reversed(geometry.padding) for amount in (pad, pad)]
        padded = nn.functional.pad(inputs, pads).flatten(2)
        patches = padded[:, :, self._taps[places]]  # [N, I, places, taps]
        patches = patches.movedim(2, 1).reshape(-1, geometry.groups, self._entries).movedim(1, 0)
        wanted = targets.movedim(2, 1).reshape(-1, geometry.groups, geometry.group_outputs).movedim(1, 0)
        if self._shifts is None:  # Sums of squares in float32 want values around 0.
            self._shifts = patches.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
            shapes = (patches.shape[2],) * 2, (wanted.shape[2], patches.shape[2]), patches.shape[2:], wanted.shape[2:]
            self._sums = [torch.zeros(geometry.groups, *one, dtype=torch.float64) for one in shapes]
            self._squares = 0.0
        patches, wanted = patches - self._shifts[0], wanted - self._shifts[1]
        moments = patches.transpose(1, 2) @ patches, wanted.transpose(1, 2) @ patches, patches.sum(1), wanted.sum(1)
        for total, more in zip(self._sums, moments, strict=True):
            total.add_(more)
        self._squares += float(wanted.square().sum(dtype=torch.float64))
        self._count += patches.shape[1]

    def statistics(self) -> Statistics:
        """Of all that was added."""
        assert self._shifts is not None, "there is a batch"
        if not all(bool(total.isfinite().all()) for total in self._sums):
            raise InputError(
                "Values inside the model are not finite",
                where="calibration",
                why=f"a convolution of {self._geometry.in_channels} channels reads or gives infinities or no numbers",
                fix="give calibration data as the model was trained for, normalised in the same way",
            )
        squares, products, patches, targets = (total / self._count for total in self._sums)
        covariance = squares - patches[:, :, None] * patches[:, None]
        cross = products - targets[:, :, None] * patches[:, None]
        variance = self._squares / self._count - float(targets.square().sum())
        patch_shift, target_shift = (one[:, 0].double() for one in self._shifts)
        return Statistics(patch_shift + patches, target_shift + targets, covariance, cross, variance, self._count)


def _tap_indices(geometry: Geometry, size: tuple[int, ...]) -> torch.Tensor:
    """For each place of the result and each tap the index of the pixel that it reads in the padded image."""
    assert not isinstance(geometry.padding, str), "graphs have numbers"
    places, taps = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    numbers = zip(
        size,
        geometry.output_size(size),
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        strict=True,
    )
    for pixels, results, kernel, stride, padding, dilation in numbers:
        wide = pixels + 2 * padding
        places = (places[:, None] * wide + torch.arange(results) * stride).flatten()
        taps = (taps[:, None] * wide + torch.arange(kernel) * dilation).flatten()
    return places[:, None] + taps
