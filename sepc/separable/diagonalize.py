"""Components of a weight that is exactly a sum of few, W[o,i,p] = Σ Q[o,r] D[r,p] P[r,i]: simultaneous diagonalisation.

If the rank r is at most the number of outputs and of inputs, then between the r leading directions of either, each tap
is a matrix T_p = Q diag(D_p) P. With two mixtures of taps, M and N, of any coefficients,

    M N⁻¹ = Q diag(Σ mₚD_p / Σ nₚD_p) Q⁻¹,          Q⁻¹ T_p = diag(D_p) P

so that eigenvectors give Q, and the row of Q⁻¹T_p for each component is the product of its P and D. This is in closed
form what a descent finds slowly, or not at all; it needs a weight that has these components up to rounding.
"""

from __future__ import annotations

from typing import Final

import torch

EXACT: Final = 5e-6
"""How much of a weight may be left, relative to its norm, where it counts as exact: rounding, a few times."""
SWEEPS: Final = 3


def components(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """P [rank, I] and D [rank, taps] of `weight` [O, I, taps] in float64; None if it is no such sum."""
    outputs, inputs, taps = weight.shape
    scale = torch.linalg.vector_norm(weight)
    if rank > min(outputs, inputs) or taps < 2 or not scale > 0:
        return None
    gather = _leading(weight.flatten(1), rank)
    spread = None if gather is None else _leading(weight.transpose(0, 1).flatten(1), rank)
    if gather is None or spread is None:
        return None
    core = torch.einsum("os,oip,ir->srp", gather, weight, spread)
    mixtures = torch.randn(2, taps, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    first, second = torch.einsum("srp,mp->msr", core, mixtures)
    # N is singular where the rank is lower than it was taken for; then nothing below is finite.
    quotient, singular = torch.linalg.solve_ex(second, first, left=False)
    if singular or not quotient.isfinite().all():
        return None
    outer = gather @ torch.linalg.eig(quotient).eigenvectors.real
    for _ in range(SWEEPS):  # After the first one they only make up for rounding in the eigenvectors.
        rows = torch.linalg.lstsq(outer, weight.flatten(1)).solution.reshape(rank, inputs, taps)
        left_vectors, values, right_vectors = torch.linalg.svd(rows, full_matrices=False)
        found = left_vectors[:, :, 0] * values[:, :1], right_vectors[:, 0]
        basis = torch.einsum("ri,rp->ipr", *found).flatten(0, 1)
        outer = torch.linalg.lstsq(basis, weight.flatten(1).T).solution.T
    rest = weight.flatten(1).T - basis @ outer.T
    return found if torch.linalg.vector_norm(rest) <= EXACT * scale else None


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor | None:
    """The `rank` leading left singular vectors [rows, rank] of `matrix`; None if they leave something of it."""
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = squares[: len(squares) - rank].sum().clamp_min(0)
    return vectors[:, -rank:] if left <= EXACT**2 * squares.sum() else None
