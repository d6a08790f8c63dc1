"""The methods of the literature: exact at full rank, exact where a weight has the form, smaller with more strength."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.separate import networks
from benchmarks.separate.bisection import STEPS, Trial, bracket, find
from benchmarks.separate.methods import METHODS
from benchmarks.separate.methods.decoupling import decoupled, terms_for
from benchmarks.separate.methods.low_rank import low_rank, rank_for
from benchmarks.separate.methods.method import weights_of
from benchmarks.separate.subject import multiply_adds


def close(actual: nn.Module, expected: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(actual(x), expected(x), atol=1e-5, rtol=1e-4)


@pytest.fixture
def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 12, 3, stride=2, padding=(1, 2), dilation=(1, 2))


X = torch.randn(2, 8, 14, 15, generator=torch.Generator().manual_seed(1))


def test_all_terms_of_a_decoupled_convolution_are_the_convolution(conv: nn.Conv2d) -> None:
    assert terms_for(conv, 0.0) == 9
    close(decoupled(conv, 9), conv, X)


def test_one_term_is_enough_where_a_convolution_is_depthwise_separable(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.copy_(torch.randn(12, 8, 1, 1) * torch.randn(1, 8, 3, 3))
    assert terms_for(conv, 1e-6) == 1
    close(decoupled(conv, 1), conv, X)


def test_decoupling_loses_the_share_of_energy_that_it_says(conv: nn.Conv2d) -> None:
    terms = terms_for(conv, 0.3)
    depthwise, pointwise = (layer.weight.detach() for layer in decoupled(conv, terms))
    made = torch.einsum("oit,itp->oip", pointwise.reshape(12, 8, terms), depthwise.reshape(8, terms, 9))
    whole = conv.weight.detach()
    lost = (made.reshape(whole.shape) - whole).square().sum() / whole.square().sum()
    assert 0.1 < float(lost) <= 0.3
    assert 1 < terms < 9
    assert terms_for(conv, float(lost) * 0.99) == terms + 1


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_full_rank_in_any_number_of_parts_is_the_convolution(conv: nn.Conv2d, parts: int) -> None:
    rank = min(12, 72 // parts)
    assert rank_for(conv, parts, 0.0) == rank
    close(low_rank(conv, parts, rank), conv, X)


def test_rank_one_is_enough_where_all_outputs_are_one_result_scaled(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.copy_(torch.randn(12, 1, 1, 1) * torch.randn(1, 8, 3, 3))
    assert rank_for(conv, 1, 1e-5) == 1
    close(low_rank(conv, 1, 1), conv, X)


def test_low_rank_loses_no_more_than_it_says_in_the_operator_norm(conv: nn.Conv2d) -> None:
    rank = rank_for(conv, 1, 0.7)
    spatial, pointwise = (layer.weight.detach().flatten(1) for layer in low_rank(conv, 1, rank))
    whole = conv.weight.detach().flatten(1)
    lost = torch.linalg.matrix_norm(whole - pointwise @ spatial, 2) / torch.linalg.matrix_norm(whole, 2)
    assert 0.2 < float(lost) <= 0.7
    assert 1 < rank < 12


def test_weights_are_counted_as_they_are(conv: nn.Conv2d) -> None:
    made = low_rank(conv, 2, 5)
    counted = sum(layer.weight.numel() for layer in made)
    assert weights_of(conv, 10, 2) == (conv.weight.numel(), counted)


@pytest.mark.parametrize("name", METHODS)
def test_more_strength_makes_a_network_smaller_from_what_it_was(name: str) -> None:
    if name == "pruning":
        pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, networks.CLASSES)]
    blocks = [networks.Residual(64, 64, 2), networks.Residual(64, 64, 1)]
    model, x = nn.Sequential(*networks.convolution(1, 64), *blocks, *ends).eval(), torch.randn(1, 1, 14, 14)
    dense = multiply_adds(model, x)
    made = [METHODS[name].compress(model, x, strength) for strength in (0.0, 0.3, 0.7, 1.0)]
    close(made[0], model, x)
    sizes = [multiply_adds(one, x) for one in made]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= dense
    assert sizes[3] < dense / 3
    assert all(one(x).shape == (1, networks.CLASSES) for one in made)
    assert multiply_adds(model, x) == dense, "the network itself is not changed"


def test_a_wanted_speedup_is_found() -> None:
    measured: list[float] = []

    def measure(strength: float) -> float:
        measured.append(strength)
        return 1 + 7 * strength**2

    trials: list[Trial] = []
    for wanted in (2.0, 4.0):
        found = find(wanted, measure, trials)
        assert found is not None
        assert math.isclose(found.speedup, wanted, rel_tol=0.03)
    assert len(measured) < 2 * STEPS, "what was measured for one wish serves the next"


def test_a_speedup_out_of_reach_is_not_searched_for_long() -> None:
    trials: list[Trial] = []
    assert find(9.0, lambda strength: 1 + strength, trials) is None
    assert trials == [Trial(1.0, 2.0)]


def test_of_steps_in_strength_the_nearest_is_taken() -> None:
    found = find(2.0, lambda strength: 1.0 if strength < 0.4 else 2.2 if strength < 0.8 else 6.0, [])
    assert found is not None
    assert found.speedup == 2.2


def test_noise_does_not_turn_the_bracket_around() -> None:
    trials = [Trial(0.2, 1.5), Trial(0.4, 2.1), Trial(0.5, 1.9), Trial(1.0, 5.0)]
    assert bracket(2.0, trials) == (0.2, 0.4)
