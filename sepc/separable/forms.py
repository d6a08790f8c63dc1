"""The forms: what a convolution with weight W [O, I, k...] can be made of, as a sequence of smaller ones, its factors.

Nothing stands between factors, so that a sequence is linear, and its kernel is a product. With r or t for the rank, p
for a tap, and sums over all indices that the left side lacks:

    bottleneck              1×1 → depthwise k×k → 1×1      W[o,i,p] = Q[o,r] D[r,p] P[r,i]
    depthwise-pointwise     depthwise k×k, T times → 1×1   W[o,i,p] = Q[o,i,t] D[i,t,p]
    pointwise-depthwise     1×1 → depthwise k×k, summed    W[o,i,p] = Q[o,t,p] P[o,t,i]
    spatial                 k×1 → 1×k                      W[o,i,(p,q)] = Q[o,r,q] V[r,i,p]
    channels                1×1 → k×k → 1×1                W[o,i,p] = Q[o,s] C[s,r,p] P[r,i]
    input-channels          1×1 → k×k                      W[o,i,p] = Q[o,r,p] P[r,i]
    output-channels         k×k → 1×1                      W[o,i,p] = Q[o,s] C[s,i,p]      also of k = 1

Each is W = Q Bᵀ: linear in its last factor Q, with a basis B made of the others, one for all outputs or one for each.
So the last factor of the best approximation follows in closed form from the others (`sepc.separable.fit`).

Strides, dilation and padding are those of the factor that has the taps. Padding comes after the first factor, which is
why that has no bias: the zeros would be zeros all the same. Groups of a convolution are taken apart one by one, and
stand beside each other in every factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import nn

from sepc.separable.diagonalize import components
from sepc.separable.geometry import Geometry, in_groups, pointwise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Form(ABC):
    """One way to take a convolution apart."""

    name: ClassVar[str]

    def factors(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        """The convolutions in place of `whole`; `rank` is per group."""
        one = replace(whole, in_channels=whole.group_inputs, out_channels=whole.group_outputs, groups=1)
        return tuple(in_groups(factor, whole.groups) for factor in self.of_one_group(one, rank))

    @abstractmethod
    def of_one_group(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        """The factors of `whole`, which has one group."""

    @abstractmethod
    def full_rank(self, whole: Geometry) -> int:
        """The rank per group at which every weight has this form exactly; 0 where it makes no sense."""

    @abstractmethod
    def start(self, weight: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """All factors but the last one for the `weight` of one group, by truncated singular value decompositions."""

    def best(self, weight: torch.Tensor, variance: torch.Tensor, rank: int) -> list[torch.Tensor] | None:
        """The same where the best ones are known, for results of this `variance`, W S Wᵀ [O, O]; None where not."""
        return None

    @abstractmethod
    def basis(self, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """B [1 or outputs, inputs·taps, m] of all factors but the last one of `whole`, which has one group."""

    def multiply_adds(self, whole: Geometry, rank: int, size: Sequence[int]) -> int:
        """Multiply-adds for one image of `size` pixels."""
        total = 0
        for factor in self.factors(whole, rank):
            total += factor.multiply_adds(size)
            size = factor.output_size(size)
        return total

    def build(
        self, whole: Geometry, rank: int, weights: Sequence[torch.Tensor], bias: torch.Tensor | None
    ) -> nn.Sequential:
        """The layers in place of `whole`."""
        factors = self.factors(whole, rank)
        layers = [factor.layer(weight, None) for factor, weight in zip(factors[:-1], weights[:-1], strict=True)]
        return nn.Sequential(*layers, factors[-1].layer(weights[-1], bias))


def _components(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of [n, rows, columns]: the left singular vectors times their values [n, s, rows], the right ones."""
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return (left * values[:, None]).transpose(1, 2), right


class Bottleneck(Form):
    """1×1 → depthwise k×k → 1×1: a CP decomposition."""

    name = "bottleneck"

    def of_one_group(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        dimensions = len(whole.kernel)
        middle = replace(whole, in_channels=rank, out_channels=rank, groups=rank)
        first, last = (pointwise(*ends, dimensions) for ends in ((whole.in_channels, rank), (rank, whole.out_channels)))
        return (first, middle, last)

    def full_rank(self, whole: Geometry) -> int:
        outputs, inputs, taps = whole.group_outputs, whole.group_inputs, whole.taps
        return min(outputs * inputs, outputs * taps, inputs * taps) if min(inputs, taps) > 1 else 0

    def start(self, weight: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """The components of a weight that has so many.

        Else of the components of all outputs' matrices over inputs and taps the largest, and beyond those unit vectors.
        """
        _, inputs, *kernel = weight.shape
        if (exact := components(weight.flatten(2), rank)) is not None:
            return [exact[0].reshape(rank, inputs, *[1] * len(kernel)), exact[1].reshape(rank, 1, *kernel)]
        spread, taps = _components(weight.flatten(2))
        spread, taps = spread.flatten(0, 1), taps.flatten(0, 1)
        chosen = torch.argsort(spread.norm(dim=1), descending=True, stable=True)[:rank]
        spread, taps = spread[chosen], taps[chosen]
        if (missing := rank - len(chosen)) > 0:
            index = torch.arange(missing, device=weight.device)
            spread = torch.cat([spread, torch.eye(inputs).to(weight)[index % inputs]])
            taps = torch.cat([taps, torch.eye(taps.shape[1]).to(weight)[index // inputs % taps.shape[1]]])
        return [spread.reshape(rank, inputs, *[1] * len(kernel)), taps.reshape(rank, 1, *kernel)]

    def basis(self, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        spread, taps = factors
        return torch.einsum("ri,rp->ipr", spread.flatten(1), taps.flatten(1)).flatten(0, 1)[None]


class DepthwisePointwise(Form):
    """Depthwise k×k with a channel multiplier, the rank → 1×1."""

    name = "depthwise-pointwise"

    def of_one_group(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        inner = whole.in_channels * rank
        depthwise = replace(whole, out_channels=inner, groups=whole.in_channels)
        return (depthwise, pointwise(inner, whole.out_channels, len(whole.kernel)))

    def full_rank(self, whole: Geometry) -> int:
        return min(whole.group_outputs, whole.taps) if min(whole.group_inputs, whole.taps) > 1 else 0

    def start(self, weight: torch.Tensor, rank: int) -> list[torch.Tensor]:
        _, inputs, *kernel = weight.shape
        taps = _components(weight.flatten(2).transpose(0, 1))[1][:, :rank]
        return [taps.reshape(inputs * rank, 1, *kernel)]

    def basis(self, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        taps = factors[0].reshape(whole.in_channels, -1, whole.taps)
        channels = torch.eye(whole.in_channels).to(taps)
        return torch.einsum("jtp,ij->ipjt", taps, channels).flatten(2).flatten(0, 1)[None]


class PointwiseDepthwise(Form):
    """1×1 to so many channels per output as the rank says → each output's taps, summed over those channels."""

    name = "pointwise-depthwise"

    def of_one_group(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        inner = whole.out_channels * rank
        depthwise = replace(whole, in_channels=inner, groups=whole.out_channels)
        return (pointwise(whole.in_channels, inner, len(whole.kernel)), depthwise)

    def full_rank(self, whole: Geometry) -> int:
        return min(whole.group_inputs, whole.taps) if min(whole.group_inputs, whole.taps) > 1 else 0

    def start(self, weight: torch.Tensor, rank: int) -> list[torch.Tensor]:
        outputs, inputs, *kernel = weight.shape
        spread = _components(weight.flatten(2))[0][:, :rank]
        return [spread.reshape(outputs * rank, inputs, *[1] * len(kernel))]

    def basis(self, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        spread = factors[0].reshape(whole.out_channels, -1, whole.in_channels)
        taps = torch.eye(whole.taps).to(spread)
        return torch.einsum("oti,pq->oiptq", spread, taps).flatten(3).flatten(1, 2)


class Spatial(Form):
    """k×1 → 1×k with the rank as channels between; of three dimensions, the first one apart from the other two."""

    name = "spatial"

    def of_one_group(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        return (
            _along(replace(whole, out_channels=rank), begin=0, end=1),
            _along(replace(whole, in_channels=rank), begin=1, end=len(whole.kernel)),
        )

    def full_rank(self, whole: Geometry) -> int:
        tall, wide = whole.kernel[0], math.prod(whole.kernel[1:])
        return min(whole.group_inputs * tall, whole.group_outputs * wide) if min(tall, wide) > 1 else 0

    def start(self, weight: torch.Tensor, rank: int) -> list[torch.Tensor]:
        outputs, inputs, tall, *kernel = weight.shape
        matrix = weight.reshape(outputs, inputs, tall, -1).permute(1, 2, 0, 3).reshape(inputs * tall, -1)
        columns = _components(matrix[None])[0][0, :rank]
        return [columns.reshape(rank, inputs, tall, *[1] * len(kernel))]

    def basis(self, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        columns = factors[0].flatten(2)
        wide = torch.eye(whole.taps // whole.kernel[0]).to(columns)
        return torch.einsum("rip,qs->ipqrs", columns, wide).flatten(3).flatten(0, 2)[None]


class Channels(Form):
    """1×1 → k×k → 1×1 (a Tucker decomposition): the rank is of the inputs, and that of the outputs in proportion."""

    name = "channels"

    def of_one_group(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        dimensions, outer = len(whole.kernel), _outer_rank(whole.group_outputs, whole.group_inputs, rank)
        middle = replace(whole, in_channels=rank, out_channels=outer)
        first = pointwise(whole.in_channels, rank, dimensions)
        return (first, middle, pointwise(outer, whole.out_channels, dimensions))

    def full_rank(self, whole: Geometry) -> int:
        return whole.group_inputs if min(whole.group_inputs, whole.group_outputs, whole.taps) > 1 else 0

    def start(self, weight: torch.Tensor, rank: int) -> list[torch.Tensor]:
        outputs, inputs, *kernel = weight.shape
        outer = _outer_rank(outputs, inputs, rank)
        spread, gather = _leading(weight.transpose(0, 1).flatten(1), rank), _leading(weight.flatten(1), outer)
        core = torch.einsum("so,oip,ri->srp", gather, weight.flatten(2), spread)
        return [spread.reshape(rank, inputs, *[1] * len(kernel)), core.reshape(outer, rank, *kernel)]

    def basis(self, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        spread, core = factors
        return torch.einsum("ri,srp->ips", spread.flatten(1), core.flatten(2)).flatten(0, 1)[None]


class InputChannels(Form):
    """1×1 → k×k: fewer channels to read, the rank, as where some are dead."""

    name = "input-channels"

    def of_one_group(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        return (pointwise(whole.in_channels, rank, len(whole.kernel)), replace(whole, in_channels=rank))

    def full_rank(self, whole: Geometry) -> int:
        return whole.group_inputs if min(whole.group_inputs, whole.taps) > 1 else 0

    def start(self, weight: torch.Tensor, rank: int) -> list[torch.Tensor]:
        _, inputs, *kernel = weight.shape
        spread = _leading(weight.transpose(0, 1).flatten(1), rank)
        return [spread.reshape(rank, inputs, *[1] * len(kernel))]

    def basis(self, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        spread = factors[0].flatten(1)
        taps = torch.eye(whole.taps).to(spread)
        return torch.einsum("ri,pq->iprq", spread, taps).flatten(2).flatten(0, 1)[None]


class OutputChannels(Form):
    """k×k → 1×1: fewer results to compute, the rank, and all others from them. Of one tap, a product of low rank.

    The results that are kept are those of the largest variance, in the metric: this is no descent, but known.
    """

    name = "output-channels"

    def of_one_group(self, whole: Geometry, rank: int) -> tuple[Geometry, ...]:
        return (replace(whole, out_channels=rank), pointwise(rank, whole.out_channels, len(whole.kernel)))

    def full_rank(self, whole: Geometry) -> int:
        rank = min(whole.group_outputs, whole.group_inputs * whole.taps)
        return rank if rank > 1 and whole.group_inputs > 1 else 0

    def best(self, weight: torch.Tensor, variance: torch.Tensor, rank: int) -> list[torch.Tensor]:
        _, inputs, *kernel = weight.shape
        leading = torch.linalg.eigh(variance).eigenvectors.flip(1)[:, :rank].T
        core = nn.functional.pad(leading, (0, 0, 0, rank - len(leading))) @ weight.flatten(1)
        return [core.reshape(rank, inputs, *kernel)]

    def start(self, weight: torch.Tensor, rank: int) -> list[torch.Tensor]:
        _, inputs, *kernel = weight.shape
        core = _leading(weight.flatten(1), rank) @ weight.flatten(1)
        return [core.reshape(rank, inputs, *kernel)]

    def basis(self, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        return factors[0].flatten(1).T[None]


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank` leading left singular vectors of `matrix` as rows; where there are not so many, zeros."""
    vectors = torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank].T
    return nn.functional.pad(vectors, (0, 0, 0, rank - len(vectors)))


def _outer_rank(outputs: int, inputs: int, rank: int) -> int:
    return max(1, min(outputs, math.ceil(rank * outputs / inputs)))


def _along(whole: Geometry, begin: int, end: int) -> Geometry:
    """`whole` in its dimensions from `begin` to `end`, and with one tap in all others."""
    inside = [begin <= dim < end for dim in range(len(whole.kernel))]

    def kept(sizes: Sequence[int], otherwise: int) -> tuple[int, ...]:
        return tuple(size if own else otherwise for size, own in zip(sizes, inside, strict=True))

    padding = whole.padding if isinstance(whole.padding, str) else kept(whole.padding, 0)
    sizes = kept(whole.kernel, 1), kept(whole.stride, 1), padding, kept(whole.dilation, 1)
    return Geometry(whole.in_channels, whole.out_channels, *sizes, padding_mode=whole.padding_mode)


FORMS: Final[Mapping[str, Form]] = {
    form.name: form
    for form in (
        Bottleneck(),
        DepthwisePointwise(),
        PointwiseDepthwise(),
        Spatial(),
        Channels(),
        InputChannels(),
        OutputChannels(),
    )
}
"""The forms by name, the default first."""
