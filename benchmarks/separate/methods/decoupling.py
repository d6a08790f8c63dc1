"""Network decoupling: every convolution a sum of depthwise separable ones (Guo, Li, Lin, Zhao, BMVC 2018).

The weight W [O, I, k²] is taken apart for each input channel i by a singular value decomposition,

    W[:,i,:] = Σ_t σ_it u_it v_itᵀ   ≈   Σ_{t≤T} (σ_it u_it) v_itᵀ

of which the v are depthwise kernels and the rest is pointwise; the T separable convolutions are here one depthwise
convolution that gives T results per channel, and one pointwise that reads them all. T is, for each layer, the smallest
that keeps a share of the energy Σ σ², and this share is the same for all layers. Data are not used.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from benchmarks.separate.methods.method import Method, sequence, weights_of, with_replaced


class Decoupling(Method):
    """Depthwise, then pointwise; the strength is the share of energy that is given up in each layer."""

    name = "decoupling"
    title: ClassVar[str] = "network decoupling"

    def compress(self, model: nn.Module, example: torch.Tensor, strength: float) -> nn.Module:
        def replacement(conv: nn.Conv2d) -> nn.Module | None:
            if conv.kernel_size == (1, 1) or conv.in_channels == 1:  # A stem of one channel is depthwise already.
                return None
            terms = terms_for(conv, strength)
            dense, decoupled_weights = weights_of(conv, terms * conv.in_channels, conv.in_channels)
            return decoupled(conv, terms) if decoupled_weights < dense else None

        return with_replaced(model, replacement)


def terms_for(conv: nn.Conv2d, lost: float) -> int:
    """The least number of terms of `conv` that lose at most the share `lost` of its energy."""
    energies = torch.linalg.svdvals(_by_input(conv)).square().sum(0)
    left = 1 - energies.cumsum(0) / energies.sum()
    # Rounding may leave something where all terms are kept.
    return 1 + int((left[:-1] > lost).sum())


def decoupled(conv: nn.Conv2d, terms: int) -> nn.Sequential:
    """The sum of so many depthwise separable convolutions that is nearest to `conv`."""
    left, values, right = torch.linalg.svd(_by_input(conv), full_matrices=False)
    kernels = right[:, :terms].reshape(-1, 1, *conv.kernel_size)
    pointwise = (left[:, :, :terms] * values[:, None, :terms]).permute(1, 0, 2).flatten(1)
    return sequence(conv, kernels.float(), conv.in_channels, pointwise.float())


def _by_input(conv: nn.Conv2d) -> torch.Tensor:
    return conv.weight.detach().double().flatten(2).transpose(0, 1)
