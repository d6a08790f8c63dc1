"""Which forms a weight has exactly, up to rounding: found out at little cost, as nearly all weights have none.

The matrices that each form is about (`sepc.separable.forms`) then have a low rank. That a matrix has more than r
independent rows is quickly certain: of any r + 1 of them, Cholesky's algorithm on their products gives the squared
distance of each to those before it, and for a rank of r one of these is zero. Only where one is nearly so, all singular
values are looked at.

A bottleneck with as many components as the smaller side has channels leaves no such trace. But any three mixtures A, B,
C of its taps are of the form Q D P with diagonal D, so that A B⁻¹ C = C B⁻¹ A, which one random vector tells. This
comes first, as for nearly all weights it leaves forms of fewer channels only.
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
COLUMNS_PER_ROW: Final = 1.25
# Pivots of a matrix that may be singular, and a difference that may be rounding where it is not: both are in float32.
SINGULAR: Final = 1e-3
COMMUTES: Final = 0.05
FEW: Final = 4


def exact_forms(whole: Geometry, weight: torch.Tensor) -> Iterator[tuple[str, int]]:
    """The forms with their ranks per group that `weight` of `whole` has, among those that save arithmetic."""
    if not 0 < float(torch.linalg.vector_norm(weight.detach())) < math.inf:
        return
    most = {name: largest_rank(name, whole) for name in FORMS}
    by_group = [_ranks(part, most) for part in weight.detach().chunk(whole.groups)]
    for name in FORMS:
        ranks = [own.get(name) for own in by_group]
        found = [rank for rank in ranks if rank is not None]
        if most[name] and len(found) == len(ranks) and max(found) <= most[name]:
            yield name, max(1, *found)


def _ranks(weight: torch.Tensor, most: Mapping[str, int]) -> dict[str, int | None]:
    """The rank of each form that `weight` [O, I, k...] of one group has, if it is at most what is in `most`."""
    by_output = weight.flatten(2)
    # A bottleneck has any rank up to that of the smaller side.
    has_any = most["bottleneck"] and _may_commute(by_output)
    largest = min(most["bottleneck"], *weight.shape[:2]) if has_any else 0
    gather = numerical_rank(by_output, max(largest, most["output-channels"]))
    spread = numerical_rank(by_output.transpose(0, 1), max(largest, most["input-channels"]))
    found: dict[str, int | None] = {"output-channels": gather, "input-channels": spread}
    if gather is not None and spread is not None:
        # The rank of the inputs at which that of the outputs, which is in proportion, suffices as well.
        outputs, inputs = weight.shape[:2]
        found["channels"] = max(spread, (gather - 1) * inputs // outputs + 1)
        found["bottleneck"] = _bottleneck(by_output, max(gather, spread), largest)
    if most["pointwise-depthwise"]:
        found["pointwise-depthwise"] = _batched_rank(by_output.transpose(1, 2), most["pointwise-depthwise"])
    if most["depthwise-pointwise"]:
        found["depthwise-pointwise"] = _batched_rank(by_output.permute(1, 2, 0), most["depthwise-pointwise"])
    if most["spatial"]:
        tall, wide = weight.shape[2], weight.flatten(3)[0, 0, 0].numel() if weight.dim() > 3 else 1
        by_row = weight.reshape(*weight.shape[:2], tall, wide).permute(1, 2, 0, 3)
        found["spatial"] = numerical_rank(by_row, most["spatial"], row_dims=2)
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


def numerical_rank(tensor: torch.Tensor, most: int, row_dims: int = 1) -> int | None:
    """The rank up to rounding of `tensor` as a matrix, its first `row_dims` dimensions rows; None if above `most`."""
    if not most:
        return None
    # Rows that are independent in some of the columns are so in all. So little is copied out of a large tensor.
    wanted_columns = math.ceil(COLUMNS_PER_ROW * (most + 1))
    inner_rows, inner_columns = math.prod(tensor.shape[1:row_dims]), math.prod(tensor.shape[row_dims + 1 :])
    some = tensor[: most // inner_rows + 1].narrow(
        row_dims, 0, min(tensor.shape[row_dims], wanted_columns // inner_columns + 1)
    )
    rows = some.flatten(0, row_dims - 1).flatten(1)[: most + 1, :wanted_columns].float()
    root, failed = torch.linalg.cholesky_ex(rows @ rows.T)
    distances = root.diagonal().square()
    if not failed and bool((distances > CERTAIN * rows.square().sum(1).max()).all()):
        return len(rows) if len(rows) <= most else None
    matrix = tensor.flatten(0, row_dims - 1).flatten(1).double()
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
        exact = some.double()
        squares = torch.linalg.eigvalsh(exact @ exact.transpose(1, 2)).flip(-1)
        rank = _rank_of_squares(squares)
        if rank > most:
            return None
    return rank


def _bottleneck(weight: torch.Tensor, rank: int, largest: int) -> int | None:
    """`rank`, if `weight` [O, I, taps] has so many components, which is also the rank of one of its sides."""
    return rank if rank <= largest and components(weight.double(), rank) is not None else None


def _may_commute(weight: torch.Tensor) -> bool:
    """Whether A B⁻¹ C = C B⁻¹ A may hold for mixtures of taps of `weight` [O, I, taps], in the leading square of each.

    Where B is nearly singular, as it is with fewer components than channels, nothing is known.
    """
    smaller = min(weight.shape[:2])
    generator = torch.Generator().manual_seed(0)
    mixtures = torch.randn(weight.shape[2], 3, generator=generator)
    first, middle, last = (weight[:smaller, :smaller].float() @ mixtures).movedim(-1, 0).contiguous()
    vector = torch.randn(smaller, 1, generator=generator)
    factors, pivots, failed = torch.linalg.lu_factor_ex(middle)
    distances = factors.diagonal().abs()
    if failed or bool(distances.min() <= SINGULAR * distances.max()):
        return True
    one = first @ torch.linalg.lu_solve(factors, pivots, last @ vector)
    other = last @ torch.linalg.lu_solve(factors, pivots, first @ vector)
    return bool((one - other).norm() <= COMMUTES * max(one.norm(), other.norm()))
