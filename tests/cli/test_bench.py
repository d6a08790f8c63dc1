"""`sepc-bench`, called in this process as the console script calls it; what it measures runs in another one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sepc.bench import peers, processes
from sepc.bench.processes import Task
from sepc.cli import bench
from sepc.errors import InputError
from tests.bench.results import result, row

NET = Path(__file__).parent / "net.py"


def test_a_model_of_the_users_own_is_measured_and_every_output_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "net.json"
    options = ["--peers", "eager,sepc", "--rounds", "2", "--input", "2x3x8x8", "--json", str(path)]
    assert bench.main([f"{NET}:make", *options]) == 0
    out = capsys.readouterr().out
    assert "Median latency in ms, 1 thread" in out
    assert "2x3x8x8" in out
    assert "max |y - eager| / max |eager|, 1 thread" in out
    document = json.loads(path.read_text())
    assert document["command"].startswith(f"sepc-bench {NET}:make --peers eager,sepc")
    figures = document["results"][0]["peers"]
    assert {*figures} == {"eager", "sepc"}
    assert all(one["is_right"] and len(one["rounds_ms"]) == 2 for one in figures.values())


def test_all_installed_peers_take_part_and_the_others_are_listed_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, asked = importlib.util.find_spec, list[Task]()

    def run(task: Task) -> object:
        asked.append(task)
        return row(task.model, task.threads, **{name: result(2.0) for name in task.peers})

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "executorch" else found(name))
    monkeypatch.setattr(processes, "run_in_process", run)
    assert bench.main([f"{NET}:make", "--threads", "1", "2"]) == 0
    out = capsys.readouterr().out
    assert "xnnpack is not measured: executorch is not installed; pip install executorch" in out
    assert [one.threads for one in asked] == [1, 2]
    expected = [name for name in peers.BUILDERS if not peers.why_missing(name)]
    assert [list(one.peers) for one in asked] == [expected] * 2
    assert "xnnpack" not in expected


def test_an_unknown_peer_is_an_error_that_lists_the_others_with_what_they_lack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "why_missing", lambda name: "it is not installed" if name == "openvino" else "")
    assert bench.main([f"{NET}:make", "--peers", "onnxruntim"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sepc-bench: There is no peer 'onnxruntim'.")
    assert "    openvino (it is not installed)\n    xnnpack\n" in err
    assert "did you mean 'onnxruntime'?" in err


@pytest.mark.parametrize("own", [result(1.0, error=1.0), result(1.0, failure="crashed")])
def test_the_exit_status_tells_whether_sepc_was_right(own: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "run_in_process", lambda task: row(task.model, sepc=own))
    assert bench.main(["net.py:make"]) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([f"{NET}:nothing"], "has no function 'nothing'"),
        ([f"{NET}:make", "--rounds", "0"], "counted from 1"),
        ([f"{NET}:make", "--input", "1x3xa"], "write 1x3x224x224"),
    ],
)
def test_what_cannot_be_measured_is_one_error(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*arguments, "--peers", "eager"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("sepc-bench: ")
    assert expected in captured.err
    assert "Traceback" not in captured.err


def test_an_exported_program_is_measured_as_a_module_and_keywords_are_refused(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    x, scale = torch.randn(1, 3, 8, 8), torch.randn(8)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(torch.nn.ReLU(), (x,)), path)
    module, inputs = bench.load(str(path), [])
    assert torch.equal(module(*inputs), x.relu())
    torch.export.save(torch.export.export(Scaled(), (x,), {"scale": scale}), path)
    with pytest.raises(InputError, match="other inputs than tensors"):
        bench.load(str(path), [])
