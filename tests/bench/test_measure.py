"""The measurement: turns, checks of outputs, failures of single runners; with runners that are free."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sepc.bench.measure import describe, inputs_text, measure, relative_error
from sepc.bench.peers import BUILDERS, Job, Runner
from tests.bench.results import altered, job_of

SHORT_S = 1e-4


@pytest.fixture
def job() -> Job:
    return job_of()


def test_every_runner_gets_every_round(job: Job) -> None:
    order: list[str] = []

    def counting(name: str) -> Runner:
        def run() -> object:
            order.append(name)
            return job.model(*job.inputs)

        return Runner(run, lambda output: [torch.as_tensor(output)])

    builders = {name: lambda _job, name=name: counting(name) for name in ("a", "b")}
    results = measure(job, ["a", "b"], 3, builders, SHORT_S)
    assert all(len(peer.rounds_ms) == 3 and peer.is_right for peer in results.values())
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert turns == ["a", "b"] * 3


def test_wrong_output_is_marked(job: Job) -> None:
    builders = {
        "eager": BUILDERS["eager"],
        "off": lambda job: altered(job, 0.1),
        "nan": lambda job: altered(job, math.nan),
    }
    results = measure(job, list(builders), 1, builders, SHORT_S)
    assert results["eager"].is_right
    assert results["eager"].error == 0.0
    assert not results["off"].is_right
    assert results["off"].error > 1e-2
    assert not results["nan"].is_right
    assert not math.isnan(results["nan"].median_ms)


def test_error_once_seen_is_kept(job: Job) -> None:
    changes = iter([math.nan] * 5 + [0.0] * 100)
    wrong_at_first = Runner(lambda: job.model(*job.inputs) + next(changes), lambda y: [torch.as_tensor(y)])
    results = measure(job, ["x"], 3, {"x": lambda _job: wrong_at_first}, 0.0)
    assert math.isnan(results["x"].error)


def test_failing_builder_and_failing_run_cost_only_their_own_column(job: Job) -> None:
    def unbuildable(_job: Job) -> Runner:
        raise RuntimeError("no such operator\nlong story")

    def unrunnable(_job: Job) -> Runner:
        return Runner(lambda: 1 / 0, lambda _output: [])

    builders = {"a": unbuildable, "b": unrunnable, "eager": BUILDERS["eager"]}
    results = measure(job, list(builders), 2, builders, SHORT_S)
    assert results["a"].failure == "RuntimeError: no such operator"
    assert results["b"].failure.startswith("ZeroDivisionError")
    assert results["eager"].is_right
    assert json.loads(json.dumps(results["a"].to_json(), allow_nan=False))["median_ms"] is None


def test_relative_error_is_by_the_largest_reference_value() -> None:
    reference = [torch.tensor([1.0, -10.0]), torch.tensor([1.0])]
    assert relative_error([torch.tensor([1.1, -10.0]), torch.tensor([1.0])], reference) == pytest.approx(0.01, rel=1e-4)
    assert math.isnan(relative_error([torch.tensor([1.0, -10.0]), torch.tensor([math.nan])], reference))


def test_relative_error_needs_the_same_shapes() -> None:
    with pytest.raises(ValueError, match="expected"):
        relative_error([torch.zeros(2)], [torch.zeros(3)])


def test_describe_is_one_short_line() -> None:
    assert describe(ValueError("")) == "ValueError"
    assert len(describe(ValueError("x" * 500))) == 200


def test_inputs_are_written_as_commands_take_them() -> None:
    assert inputs_text((torch.zeros(1, 3, 8, 8), torch.zeros(2, dtype=torch.int64))) == "1x3x8x8, 2:int64"
