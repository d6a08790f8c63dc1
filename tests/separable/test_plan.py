"""A plan is applied to a copy, saved and loaded, and refused by a model that it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc.separable.calibrated import Option, fit_weights
from sepc.separable.layers import find_layers
from sepc.separable.plan import Plan
from tests.separable.networks import graph_of, network, smooth_images

PATHS = ("3.first", "4")


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def plan(model: nn.Module) -> Plan:
    graph_module = graph_of(model, smooth_images(2))
    layers = [one for one in find_layers(model, graph_module)[0] if one.path in PATHS]
    return Plan({one.path: fit_weights(one, Option("bottleneck", 16), graph_module, 3, 0) for one in layers})


def test_it_is_applied_to_a_copy(model: nn.Module, plan: Plan) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = plan.apply(model)
    assert [type(result.get_submodule(path)) for path in PATHS] == [nn.Sequential] * 2
    assert [type(model.get_submodule(path)) for path in PATHS] == [nn.Conv2d] * 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(result.get_submodule("4")) == 3


def test_the_result_is_a_module_like_any_other(model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    result, x = plan.apply(model), smooth_images(2)
    with torch.no_grad():
        expected = result(x)
    torch.save(result.state_dict(), tmp_path / "state.pt")
    again = plan.apply(network())
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    exported = torch.export.export(result, (x,)).module()
    with torch.no_grad():
        assert torch.equal(again(x), expected)
        torch.testing.assert_close(exported(x), expected)
    result.train()(x).sum().backward()
    assert all(one.grad is not None for one in result.parameters())


def test_frozen_and_moved_layers_stay_so(model: nn.Module, plan: Plan) -> None:
    model[4].requires_grad_(False)
    result = plan.apply(model.double())
    assert not any(one.requires_grad for one in result[4].parameters())
    assert all(one.requires_grad and one.dtype == torch.float64 for one in result[3].first.parameters())


def test_a_saved_plan_does_the_same(model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.pt")
    loaded, x = sepc.Plan.load(tmp_path / "plan.pt"), smooth_images(2)
    with torch.no_grad():
        assert torch.equal(loaded.apply(model)(x), plan.apply(model)(x))
    assert {path: (one.form, one.rank, one.error) for path, one in loaded.layers.items()} == {
        path: (one.form, one.rank, one.error) for path, one in plan.layers.items()
    }


def test_a_plan_holds_no_pickle(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("load", "save"):
        monkeypatch.setattr(torch, function, None)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").layers.keys() == plan.layers.keys()


@pytest.mark.parametrize("content", [b"nonsense", {"format": "another"}, {"layers": {}}, [1]])
def test_other_files_are_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(sepc.ArtifactError, match="This file holds no plan"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 3)), "the model has no module '3.first'"),
        (network(channels=8), "its factors have shapes"),
    ],
)
def test_a_model_that_it_was_not_made_for_is_refused(plan: Plan, other: nn.Module, reason: str) -> None:
    with pytest.raises(sepc.InputError, match="The plan does not fit the model") as caught:
        plan.apply(other)
    assert reason in str(caught.value)


def test_what_is_no_plan_for_a_module_is_refused(model: nn.Module, plan: Plan) -> None:
    exported = torch.export.export(model, (smooth_images(2),))
    with pytest.raises(sepc.InputError, match="the model is an ExportedProgram"):
        sepc.compile(exported, separate=plan)
    with pytest.raises(sepc.InputError, match="it is 'all'"):
        sepc.compile(model, separate="all")
