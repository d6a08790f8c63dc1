"""Weights that are sums of few components are taken apart in closed form, and others are refused."""

from __future__ import annotations

import pytest
import torch

from sepc.separable.diagonalize import EXACT, components


def planted(outputs: int, inputs: int, taps: int, rank: int) -> torch.Tensor:
    """Of that rank, rounded to float32 as weights are."""
    sizes = (outputs, inputs, taps)
    factors = [torch.randn(size, rank, dtype=torch.float64) for size in sizes]
    return torch.einsum("or,ir,pr->oip", *factors).float().double()


def unexplained(weight: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor]) -> float:
    basis = torch.einsum("ri,rp->ipr", *found).flatten(0, 1)
    rows = weight.flatten(1).T
    return float((rows - basis @ torch.linalg.lstsq(basis, rows).solution).norm() / rows.norm())


@pytest.mark.parametrize(
    ("outputs", "inputs", "taps", "rank"), [(8, 6, 9, 4), (6, 6, 9, 6), (16, 32, 3, 16), (5, 4, 2, 1)]
)
def test_components_are_found_to_rounding(outputs: int, inputs: int, taps: int, rank: int) -> None:
    weight = planted(outputs, inputs, taps, rank)
    found = components(weight, rank)
    assert found is not None
    assert unexplained(weight, found) < EXACT


def test_components_with_the_same_taps_are_found() -> None:
    """One depthwise filter for all: a matrix times a vector, whose eigenvalues are all alike."""
    weight = torch.einsum("oi,p->oip", torch.randn(6, 5).double(), torch.randn(9).double())
    found = components(weight, 5)
    assert found is not None
    assert unexplained(weight, found) < EXACT


@pytest.mark.parametrize(
    ("weight", "rank"),
    [
        (torch.randn(8, 6, 9).double(), 4),
        (planted(8, 6, 9, 5), 4),
        (planted(8, 6, 9, 8), 8),
        (planted(8, 6, 1, 2), 2),
        (torch.zeros(8, 6, 9).double(), 2),
    ],
    ids=["random", "of a higher rank", "more than inputs", "one tap", "zeros"],
)
def test_other_weights_have_none(weight: torch.Tensor, rank: int) -> None:
    assert components(weight, rank) is None


def test_a_rank_that_is_too_high_does_no_harm() -> None:
    weight = planted(8, 6, 9, 3)
    found = components(weight, 5)
    assert found is None or unexplained(weight, found) < EXACT
