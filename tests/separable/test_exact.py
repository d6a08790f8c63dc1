"""Forms that a weight has are found with their ranks, whatever the shape; of others it is seen that they have none."""

from __future__ import annotations

import pytest
import torch

from sepc.separable.exact import exact_forms, numerical_rank
from sepc.separable.fit import compose, fit
from sepc.separable.forms import FORMS
from sepc.separable.geometry import Geometry

SHAPES = {
    "square": Geometry(16, 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "wide": Geometry(12, 24, (3, 3), (2, 2), (1, 1), (1, 1)),
    "narrow": Geometry(24, 12, (5, 3), (1, 1), (1, 1), (1, 1)),
    "groups": Geometry(32, 16, (3, 3), (1, 1), (1, 1), (1, 1), groups=2),
    "1-D": Geometry(16, 12, (7,), (1,), (3,), (1,)),
    "3-D": Geometry(8, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
}
RANKS = {"bottleneck": 6, "depthwise-pointwise": 1, "pointwise-depthwise": 1, "spatial": 4, "channels": 4}
RANKS |= {"input-channels": 4, "output-channels": 4}
CASES = [(form, shape) for form in FORMS for shape in SHAPES if FORMS[form].full_rank(SHAPES[shape])]


def planted(form: str, whole: Geometry, rank: int) -> torch.Tensor:
    factors = [torch.randn(one.weight_shape, dtype=torch.float64) for one in FORMS[form].factors(whole, rank)]
    return compose(FORMS[form], whole, factors).float()


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_a_planted_form_is_found_with_its_rank(form: str, shape: str) -> None:
    whole = SHAPES[shape]
    weight = planted(form, whole, RANKS[form])
    found = dict(exact_forms(whole, weight))
    assert found[form] == RANKS[form]
    assert fit(FORMS[form], whole, found[form], weight, steps=0).error < 5e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_components_as_channels_are_found(shape: str) -> None:
    whole = SHAPES[shape]
    smaller = min(whole.group_inputs, whole.group_outputs)
    assert dict(exact_forms(whole, planted("bottleneck", whole, smaller)))["bottleneck"] == smaller


@pytest.mark.parametrize("shape", SHAPES)
def test_other_weights_have_no_form(shape: str) -> None:
    whole = SHAPES[shape]
    weight = torch.randn(whole.weight_shape)
    assert dict(exact_forms(whole, weight)) == {}
    nearly = planted("channels", whole, 2) + 1e-3 * weight
    assert dict(exact_forms(whole, nearly)) == {}


def test_dead_channels_are_a_lower_rank() -> None:
    whole = SHAPES["square"]
    weight = torch.randn(whole.weight_shape)
    weight[:, ::2] = 0
    weight[3:12] = 0
    found = dict(exact_forms(whole, weight))
    assert (found["channels"], found["input-channels"], found["output-channels"]) == (8, 8, 7)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_of_nothing_or_of_no_numbers_has_no_form(value: float) -> None:
    whole = SHAPES["square"]
    assert dict(exact_forms(whole, torch.full(whole.weight_shape, value))) == {}


@pytest.mark.parametrize(
    ("rank", "most", "expected"), [(5, 8, 5), (8, 8, 8), (9, 8, None), (20, 8, None), (20, 20, 20)]
)
def test_the_rank_of_a_matrix_is_found_up_to_a_limit(rank: int, most: int, expected: int | None) -> None:
    matrix = (torch.randn(20, rank).double() @ torch.randn(rank, 50).double()).float().double()
    assert numerical_rank(matrix, most) == expected
    assert numerical_rank(matrix * 1e-12, most) == expected


def test_rows_that_repeat_do_not_hide_a_rank() -> None:
    rows = torch.randn(20, 50).double()
    assert numerical_rank(torch.cat([rows[:1], rows]), 10) is None
