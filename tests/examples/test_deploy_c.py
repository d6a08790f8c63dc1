"""The example of deployment writes C for two architectures, builds it with CMake, runs it, and compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import deploy_c as example


@pytest.mark.slow
def test_programs_for_this_host_and_for_arm_agree_with_pytorch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model", "test_efficientnet", "--size", "64", "--output", str(tmp_path)]
    assert example.main([*small, "--targets", "native", "arm64"]) == 0
    output = capsys.readouterr().out
    assert output.count(": agrees") == 2
    assert "-DCMAKE_SYSTEM_PROCESSOR=aarch64" in output
    assert all((tmp_path / name / "build" / "net_main").is_file() for name in ("native", "arm64"))


@pytest.mark.slow
def test_a_wrong_result_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = example.run
    monkeypatch.setattr(example, "run", lambda *arguments: run(*arguments) + 1)
    small = ["--model", "test_efficientnet", "--size", "32", "--output", str(tmp_path), "--targets", "native"]
    assert example.main(small) == 1
