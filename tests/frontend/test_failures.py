"""What torch.export raises, told by where it is and what to do; and arguments that are not the model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sepc.errors import InputError, ModelError
from sepc.frontend.export import capture
from sepc.frontend.failures import guarded

X = torch.ones(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [((X, X), {}, "too many"), ((), {}, "missing.*'input'"), ((X,), {"scale": 2}, "unexpected.*'scale'")],
)
def test_arguments_that_forward_does_not_take_are_refused_by_its_signature(
    args: tuple[torch.Tensor, ...], kwargs: dict[str, int], why: str
) -> None:
    with pytest.raises(InputError, match=rf"(?s)not those of the model.*Conv2d\.forward\(input: .*\).*{why}"):
        capture(nn.Conv2d(3, 4, 1), args, kwargs)


def test_a_layer_that_refuses_its_input_is_named_where_no_line_is_the_users() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(4, 8, 1)))
    with pytest.raises(ModelError, match=r"(?s)layer '1\.0', Conv2d\(4, 8.*to have 4 channels.*without sepc fails"):
        capture(model, (X,))


class Fails(nn.Module):
    """Fails in a line of its own, within a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(7)  # the line


def test_the_users_line_comes_before_the_layer() -> None:
    with pytest.raises(ModelError, match=r"(?s)test_failures\.py:\d+: return x\.reshape\(7\)  # the line"):
        capture(nn.Sequential(Fails()), (X,))


def test_an_error_of_ours_is_told_as_it_is_and_one_without_words_by_its_type() -> None:
    def raises(error: Exception) -> torch.export.ExportedProgram:
        raise error

    with pytest.raises(InputError, match="ours"):
        guarded(lambda: raises(InputError("ours")))
    with pytest.raises(ModelError, match="Why: KeyError"):
        guarded(lambda: raises(KeyError()))
