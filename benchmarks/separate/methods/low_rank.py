"""Low rank between channels by singular value decompositions, as in ALDS (Liebenwein, Maalouf, Feldman, Rus, 2021).

The input channels are split into g parts. The weight of each, as a matrix over outputs and its inputs' taps, is cut
to its j largest singular values: a k×k convolution of g groups to g·j channels, and a pointwise one. What is lost is

    ε = max over parts of σ_{j+1} / σ_1

relative in the operator norm. Layers are to share the least largest ε that a budget allows: so for one ε each layer
takes the g and j with the fewest multiply-adds that keep it, and ε follows from the budget. Data are not used.

Beyond the paper, j is rounded up to whole vectors, as the time is that of whole vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Final

import torch
from torch import nn

from benchmarks.separate.methods.method import Method, sequence, weights_of, with_replaced

VECTOR: Final = 16


class LowRank(Method):
    """A convolution to fewer channels, then pointwise; the strength is ε.

    Args:
        name: of the method.
        parts: the values of g to choose from.
    """

    title: ClassVar[str] = "low rank, minimax"

    def __init__(self, name: str, parts: Sequence[int]) -> None:
        self.name, self._parts = name, tuple(parts)

    def compress(self, model: nn.Module, example: torch.Tensor, strength: float) -> nn.Module:
        def replacement(conv: nn.Conv2d) -> nn.Module | None:
            options: list[tuple[int, int, int]] = []
            for parts in self._parts:
                if conv.in_channels % parts == 0:
                    rank = math.ceil(rank_for(conv, parts, strength) / VECTOR) * VECTOR
                    options.append((weights_of(conv, parts * rank, parts)[1], parts, rank))
            fewest, parts, rank = min(options)
            return low_rank(conv, parts, rank) if fewest < conv.weight.numel() else None

        return with_replaced(model, replacement)


def rank_for(conv: nn.Conv2d, parts: int, error: float) -> int:
    """The least rank of `conv` in so many parts that loses at most `error`."""
    values = torch.linalg.svdvals(_matrices(conv, parts))
    largest = (values / values[:, :1].clamp_min(torch.finfo(values.dtype).tiny)).amax(0)
    return max(1, int((largest > error).sum()))


def low_rank(conv: nn.Conv2d, parts: int, rank: int) -> nn.Sequential:
    """The nearest to `conv` whose matrices of so many parts of its inputs have this rank."""
    left, values, right = torch.linalg.svd(_matrices(conv, parts), full_matrices=False)
    spatial = right[:, :rank].reshape(-1, conv.in_channels // parts, *conv.kernel_size)
    pointwise = (left[:, :, :rank] * values[:, None, :rank]).permute(1, 0, 2).flatten(1)
    return sequence(conv, spatial.float(), parts, pointwise.float())


def _matrices(conv: nn.Conv2d, parts: int) -> torch.Tensor:
    """[parts, outputs, inputs·taps of a part]."""
    return torch.stack([part.flatten(1) for part in conv.weight.detach().double().chunk(parts, 1)])
