"""The comparison of models by name: its command line, and its processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare
from sepc.bench.peers import AVX2, NATIVE
from tests.bench.results import result, row


def test_command_line() -> None:
    options = compare.parse(["resnet50", "--threads", "1", "2", "--peers", "eager,sepc"])
    assert (options.models, options.threads, options.peers) == (["resnet50"], [1, 2], ["eager", "sepc"])
    assert (options.size, options.isa) == (None, NATIVE)
    options = compare.parse(["resnet50", "--isa", "avx2", "--batch", "16", "--size", "1024"])
    assert (options.isa, options.batch, options.size) == (AVX2, 16, 1024)


@pytest.mark.parametrize(
    "arguments", [["m", "--peers", "tensorrt"], ["m", "--threads", "0"], ["m", "--isa", "sse"], []]
)
def test_bad_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse(arguments)
    assert "error:" in capsys.readouterr().err


def test_main_reports_sepc_by_its_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"good": result(1.0), "bad": result(1.0, error=1.0)}
    monkeypatch.setattr(compare, "run_in_process", lambda model, threads, _o: row(model, threads, sepc=own[model]))
    files = ["--output", str(tmp_path), "--name", "r"]
    assert compare.main(["good", *files]) == 0
    assert compare.main(["good", "bad", *files]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.svg"}


def test_unknown_model_fails_in_its_own_process(tmp_path: Path) -> None:
    options = compare.parse(["no_such_model", "--peers", "eager", "--output", str(tmp_path)])
    failed = compare.run_in_process("no_such_model", 1, options)
    assert "no_such_model" in failed.peers["eager"].failure


def test_limit_is_in_force_in_the_process_that_measures() -> None:
    options = compare.parse("m --isa avx2 --peers eager --size 32 --rounds 1".split())
    measured = compare.run_in_process("mobilenetv3_small_050", 1, options)
    # What PyTorch says of itself, not what was asked for.
    assert (measured.isa, measured.peers["eager"].isa, measured.peers["eager"].failure) == (AVX2, AVX2, "")
    assert json.loads(json.dumps(measured.to_json()))["peers"]["eager"]["isa"] == AVX2
