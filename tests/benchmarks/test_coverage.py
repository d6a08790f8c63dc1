"""The table of coverage: what is counted, when a model passes, how a run survives crashes and goes on."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sepc
from benchmarks import models
from benchmarks.coverage import __main__ as command
from benchmarks.coverage import one_model, table, zoo
from benchmarks.coverage.one_model import DYNAMO, EXPORT, Partition, Row, partition, variation


class Mixed(nn.Module):
    """A convolution of ours, a product that PyTorch runs, a logarithm of a softmax that TVM lowers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).flatten(2)
        return torch.baddbmm(torch.ones(1, 8, 8), y, y.transpose(1, 2)).log_softmax(1)


def found(**changes: Any) -> dict[str, Any]:
    return {"failure": "", "is_right": True, "error": 1e-6, "median_ms": 2.0, "build_s": 5.0, **changes}


def row(name: str = "net", **changes: Any) -> Row:
    ways = {"eager": found(median_ms=6.0), EXPORT: found()}
    shares = Partition({"sepc": 300, "torch": 100}, {"sepc": 1}, {"sepc": 4, "torch": 1}, {"sepc": 3, "torch": 1})
    return Row(
        **{"model": name, "size": 32, "rounds": 2, "variation": 0.5, "ways": ways, "partition": shares, **changes}
    )


def test_the_partition_counts_convolutions_and_flops_by_who_computes_them() -> None:
    x = torch.randn(1, 3, 16, 16)
    found = partition(sepc.explain(Mixed().eval(), x))
    assert found.convolutions["sepc"] == sum(found.convolutions.values()) == 1
    assert found.flops["sepc"] == 2 * 256 * 8 * 27
    assert found.flops["torch"] == 2 * 8 * 8 * 256
    assert found.regions["tvm"] == 1
    assert found.bytes_moved["tvm"] == 2 * 4 * 64
    assert found.fallbacks == {
        "no stage for aten.baddbmm.default": 1,
        "no stage for aten.log_softmax.int": 1,
    }


def test_every_kind_of_convolution_counts() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Conv2d(3, 3, 1), nn.Flatten(2), nn.Conv1d(3, 2, 1))
    explanation = sepc.explain(model.eval(), torch.randn(1, 2, 4, 4))
    assert sum(partition(explanation).convolutions.values()) == 3


def test_a_model_that_ignores_its_input_is_found_out() -> None:
    x, conv = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 4, 3)
    assert variation(conv, (x,)) > 0.1
    assert variation(nn.Sequential(conv, nn.Threshold(99.0, 9.0)), (x,)) == 0
    assert variation(nn.Sequential(conv, nn.Threshold(99.0, math.nan)), (x,)) == 0
    assert table.verdict(row(variation=1e-5)).startswith("degenerate")


def test_what_rounding_alone_does_is_told() -> None:
    x = torch.randn(64)
    assert one_model.eager_error(nn.Identity(), (x,)) == 0
    error = one_model.eager_error(Cancellation(), (x,))
    assert error is not None
    assert 1e-3 < error < 10


class Cancellation(nn.Module):
    """Loses nearly all digits of float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / 7 + 30000) - 30000


def test_verdicts() -> None:
    assert table.verdict(row()) == table.PASSED
    assert table.verdict(row(ways={"eager": found()})) == "nothing was tried"
    assert table.verdict(row(failure="it took longer than 9 s")) == "it took longer than 9 s"
    wrong = row(ways={EXPORT: found(is_right=False, error=0.5)})
    assert table.verdict(wrong) == "export: WRONG by 0.5"
    wrong.eager_error = 0.25
    assert table.verdict(wrong) == "export: WRONG by 0.5; eager is 0.25 from float64"
    not_a_number = row(ways={EXPORT: found(), DYNAMO: found(is_right=False, error=None)})
    assert table.verdict(not_a_number) == "dynamo: not a number"
    assert table.verdict(row(ways={EXPORT: found(failure="ValueError: x")})) == "export: ValueError: x"


def test_the_table_says_what_was_found() -> None:
    slow = row("slow", ways={"eager": found(median_ms=1.0), EXPORT: found()})
    text = table.text([row("good"), slow, row("bad", failure="it broke", ways={}, partition=None)])
    cells = "good 32 yes 75.0 0.0 25.0 3/4 4+0+1 5 6 2 3 – –".split()
    assert next(line.split() for line in text.splitlines() if line.startswith("good")) == cells
    assert "Not passed:\nbad: it broke" in text
    assert "Slower than eager:\nslow: 0.50" in text
    assert "2 of 3 models passed." in text
    assert "6 of 8 convolutions in sepc's own stages: 75.0%" in text
    assert "1 of 2 models slower than eager; geometric mean of the speed-up 1.22" in text


def test_without_rounds_no_time_is_shown() -> None:
    assert table.speed_up(row(rounds=0)) != table.speed_up(row(rounds=0))
    assert "geometric mean" not in table.text([row(rounds=0)])


def test_results_are_written_and_read_again(tmp_path: Path) -> None:
    rows = [row("one"), row("two", partition=None, failure="broke")]
    table.write(tmp_path, rows, "python -m benchmarks.coverage")
    assert table.read(tmp_path) == rows
    assert table.read(tmp_path / "nowhere") == []
    document = json.loads((tmp_path / "coverage.json").read_text())
    assert [one["verdict"] for one in document["rows"]] == ["yes", "broke"]
    assert "torch" in document["versions"]


def test_each_model_is_run_once_and_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []

    def run(name: str, options: argparse.Namespace) -> Row:
        called.append(name)
        return row(name)

    monkeypatch.setattr(command, "run_in_process", run)
    assert command.main(["b", "--output", str(tmp_path)]) == 0
    assert command.main(["a", "b", "c", "--resume", "--output", str(tmp_path)]) == 0
    assert called == ["b", "a", "c"]
    assert [one.model for one in table.read(tmp_path)] == ["a", "b", "c"]
    assert "[1/2] a: yes, error 1.0e-06, 3.00 times as fast as eager" in capsys.readouterr().out
    monkeypatch.setattr(command, "run_in_process", lambda name, options: row(name, failure="broke"))
    assert command.main(["a", "--output", str(tmp_path)]) == 1


def test_a_crash_and_a_timeout_cost_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    options = command.parse(["net", "--timeout", "7"])

    def crash(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, -11, "", "a\nSegmentation fault\n")

    def hang(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(arguments, 7)

    monkeypatch.setattr(subprocess, "run", crash)
    assert command.run_in_process("net", options).failure == "the process ended with status -11: Segmentation fault"
    monkeypatch.setattr(subprocess, "run", hang)
    assert command.run_in_process("net", options).failure == "it took longer than 7 s"


def test_a_model_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = command.parse(["lcnet_050", "--rounds", "0", "--size", "64", "--ways", "export"])
    done = command.run_in_process("lcnet_050", options)
    assert table.verdict(done) == table.PASSED
    assert done.size == 64
    assert done.partition is not None
    assert done.partition.convolutions.keys() == {"sepc"}
    assert command.run_in_process("no_such_model", options).failure.startswith("RuntimeError: Unknown model")


def test_dynamo_compiles_by_our_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        used.append("sepc")
        return graph.forward

    model = nn.Conv2d(3, 4, 3).eval().requires_grad_(False)
    monkeypatch.setattr(models, "load", lambda name, size: (model, (torch.randn(2, 3, 8, 8),)))
    original, replaced = torch.compile, {"sepc": backend}
    monkeypatch.setattr(torch, "compile", lambda model, backend: original(model, backend=replaced[backend]))
    assert table.verdict(one_model.run("net", 0, [DYNAMO], 8)) == table.PASSED
    assert used == ["sepc"]


def test_the_list_has_no_model_twice_and_knows_which_need_graph_breaks() -> None:
    names = zoo.names()
    assert len(zoo.TIMM) == 61
    assert len(set(names)) == len(names)
    assert set(names) < set(zoo.names(every=True))
    assert zoo.needs_graph_breaks("torchvision/ssd300_vgg16")
    assert not zoo.needs_graph_breaks("torchvision/fcn_resnet50")
    assert not zoo.needs_graph_breaks("resnet50")


@pytest.mark.parametrize("name", zoo.TIMM)
def test_timm_has_every_model_of_the_list(name: str) -> None:
    import timm

    assert timm.is_model(name.partition(".")[0])


def test_main_of_one_model_writes_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_model, "run", lambda *arguments: row(str(arguments)))
    assert one_model.main(["net", "--rounds", "1", "--output", str(tmp_path / "row.json")]) == 0
    assert json.loads((tmp_path / "row.json").read_text()) == asdict(row("('net', 1, ['export', 'dynamo'], None)"))
