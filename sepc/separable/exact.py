"""Which forms a weight has exactly, up to rounding: found out at little cost, as nearly all weights have none.

The matrices that each form is about (`sepc.separable.forms`) then have a low rank. That a matrix has more than r
independent rows is quickly certain: of any r + 1 of them, Cholesky's algorithm on their products gives the squared
distance of each to those before it, and for a rank of r one of these is zero. Only where one is nearly so, all singular
values are looked at.

A bottleneck with as many components as the smaller side has channels leaves no such trace. But any three mixtures A, B,
C of its taps are of the form Q D P with diagonal D, so that A B⁻¹ C = C B⁻¹ A, which one random vector tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

import torch

from sepc.separable.diagonalize import EXACT, components
from sepc.separable.forms import FORMS
from sepc.separable.geometry import Geometry

# Of the multiply-adds of a dense layer: with more, no form is faster, as a dense layer has quicker algorithms.
MOST_ARITHMETIC: Final = 0.7
# Squared distances of rows from others, relative to the largest row, that are certainly not rounding of float32.
CERTAIN: Final = 1e-4
COMMUTES: Final = 1e-3
FEW: Final = 4


def exact_forms(whole: Geometry, weight: torch.Tensor) -> Iterator[tuple[str, int]]:
    """The forms with their ranks per group that `weight` of `whole` has, among those that save arithmetic."""
    if not bool(weight.isfinite().all()) or not bool(weight.any()):
        return
    most = {name: largest_rank(name, whole) for name in FORMS}
    by_group = [_ranks(part.double(), most) for part in weight.detach().chunk(whole.groups)]
    for name in FORMS:
        ranks = [own.get(name) for own in by_group]
        found = [rank for rank in ranks if rank is not None]
        if most[name] and len(found) == len(ranks) and max(found) <= most[name]:
            yield name, max(1, *found)


def _ranks(weight: torch.Tensor, most: Mapping[str, int]) -> dict[str, int | None]:
    """The rank of each form that `weight` [O, I, k...] of one group has, if it is at most what is in `most`."""
    outputs, inputs = weight.shape[:2]
    smaller = min(outputs, inputs)
    # Rank of both sides, needed by several forms: a bottleneck has any up to that of the smaller side.
    gather = numerical_rank(weight.flatten(1), max(smaller, most["output-channels"]))
    spread = numerical_rank(weight.transpose(0, 1).flatten(1), max(smaller, most["input-channels"]))
    found: dict[str, int | None] = {"output-channels": gather, "input-channels": spread}
    if gather is not None and spread is not None:
        # The rank of the inputs at which that of the outputs, which is in proportion, suffices as well.
        found["channels"] = max(spread, (gather - 1) * inputs // outputs + 1)
        found["bottleneck"] = _bottleneck(weight.flatten(2), max(gather, spread))
    by_output = weight.flatten(2)
    found["pointwise-depthwise"] = _batched_rank(by_output.transpose(1, 2), most["pointwise-depthwise"])
    found["depthwise-pointwise"] = _batched_rank(by_output.permute(1, 2, 0), most["depthwise-pointwise"])
    if most["spatial"]:
        columns = weight.flatten(3).permute(1, 2, 0, 3)
        found["spatial"] = numerical_rank(columns.flatten(2).flatten(0, 1), most["spatial"])
    return found


def largest_rank(name: str, whole: Geometry) -> int:
    """The largest rank of a form that saves arithmetic; 0 if there is none. Pixels do not matter."""
    form = FORMS[name]
    low, high = 0, form.full_rank(whole)
    limit = MOST_ARITHMETIC * math.prod(whole.weight_shape)
    while low < high:
        middle = (low + high + 1) // 2
        products = sum(math.prod(one.weight_shape) for one in form.factors(whole, middle))
        low, high = (middle, high) if products <= limit else (low, middle - 1)
    return low


def numerical_rank(matrix: torch.Tensor, most: int) -> int | None:
    """The rank of `matrix` up to rounding, or None if it is more than `most`."""
    # Rows that are independent in some of the columns are so in all.
    rows = matrix[: most + 1, : 2 * (most + 1)].float()
    root, failed = torch.linalg.cholesky_ex((rows @ rows.T).double())
    distances = root.diagonal().square()
    if not failed and bool((distances > CERTAIN * rows.square().sum(1).max()).all()):
        return len(rows) if len(rows) <= most else None
    squares = torch.linalg.eigvalsh(matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix)
    rank = _rank_of_squares(squares.flip(0))
    return rank if rank <= most else None


def _rank_of_squares(squares: torch.Tensor) -> int:
    """How many of the descending squared singular values [..., n] it takes, in each row, until the rest is rounding."""
    rest = squares.clamp_min(0).flip(-1).cumsum(-1).flip(-1)
    return int((rest > EXACT**2 * squares.sum()).sum(-1).max())


def _batched_rank(matrices: torch.Tensor, most: int) -> int | None:
    """The largest rank among matrices [n, taps, columns], or None if that is more than `most`."""
    rank = 0
    for some in (matrices[:FEW], matrices):  # Few tell for nearly all weights.
        squares = torch.linalg.eigvalsh(some @ some.transpose(1, 2)).flip(-1)
        rank = _rank_of_squares(squares)
        if rank > most:
            return None
    return rank


def _bottleneck(weight: torch.Tensor, rank: int) -> int | None:
    """`rank`, if `weight` [O, I, taps] has so many components, which is also the rank of one of its sides."""
    smaller = min(weight.shape[:2])
    if rank > smaller or (rank == smaller and not _commutes(weight)):
        return None
    return rank if components(weight, rank) is not None else None


def _commutes(weight: torch.Tensor) -> bool:
    """Whether A B⁻¹ C = C B⁻¹ A for mixtures of taps of `weight` [O, I, taps], in the leading square of each."""
    smaller = min(weight.shape[:2])
    generator = torch.Generator().manual_seed(0)
    mixtures = torch.randn(weight.shape[2], 3, generator=generator)
    first, middle, last = (weight[:smaller, :smaller].float() @ mixtures).movedim(-1, 0).double()
    vector = torch.randn(smaller, 1, generator=generator, dtype=weight.dtype)
    factors, pivots, failed = torch.linalg.lu_factor_ex(middle)
    if failed:
        return True  # Nothing is known.
    one = first @ torch.linalg.lu_solve(factors, pivots, last @ vector)
    other = last @ torch.linalg.lu_solve(factors, pivots, first @ vector)
    return bool((one - other).norm() <= COMMUTES * max(one.norm(), other.norm()))
