"""What users see of `sepc-opt`, typed as they would type it, to the letter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sepc
from sepc.cli import models
from sepc.cli.opt import main

if TYPE_CHECKING:
    from collections.abc import Callable

NET = Path(__file__).parent / "net.py"
Typed = Callable[..., tuple[str, str]] if TYPE_CHECKING else object
LINES = 10


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Types a command in an empty directory; gives the lines of its output and of its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, status: int = 0) -> tuple[str, str]:
        assert main(words) == status
        captured = capsys.readouterr()
        return captured.out, captured.err.replace(str(NET.parent), "tests/cli")

    return run


def test_a_difference_shows_what_one_pass_changed(typed: Typed, golden: Callable[[str, str], None]) -> None:
    out, err = typed(f"{NET}:make", "--passes", "fold-batch-norm", "--diff")
    assert not err
    golden("cli/diff", out)


def test_the_ir_is_dumped_with_pictures_where_it_changed(typed: Typed, golden: Callable[[str, str], None]) -> None:
    out, err = typed(f"{NET}:make", "--target", "x86-64-v3", "--dump-ir")
    assert not out
    assert err == "Written: sepc-ir/index.html\n"
    files = "\n".join(sorted(path.name for path in Path("sepc-ir").iterdir()))
    program = re.sub(r"weights/\w{16}", "weights/…", Path("sepc-ir/008_group.py").read_text())
    golden("cli/dump", f"{files}\n\n{program}")


def test_assembly_is_what_the_target_runs(typed: Typed, golden: Callable[[str, str], None]) -> None:
    out, err = typed(f"{NET}:clip", "--target", "arm64", "--emit=asm")
    assert not err
    kernel = out[: out.index("\tret\n") + 5]
    lines = [line for line in kernel.splitlines() if not line.startswith(("\t.", ".L"))]
    golden("cli/asm", re.sub(r"sepc_\w{16}", "sepc_…", "\n".join(lines)) + "\n")


def test_a_model_that_cannot_be_traced_is_told_in_few_lines(typed: Typed, golden: Callable[[str, str], None]) -> None:
    out, err = typed(f"{NET}:branch", status=1)
    assert not out
    assert len(err.splitlines()) <= LINES
    golden("cli/untraceable", err)
    given = models.load(f"{NET}:branch")
    with pytest.raises(sepc.ModelError) as raised:
        sepc.compile(given.model, example_inputs=given.inputs)
    assert f"sepc-opt: {raised.value}\n".replace(str(NET.parent), "tests/cli") == err


@pytest.mark.parametrize("function", ["unsupported", "many_unsupported"])
def test_operators_without_kernels_for_another_target_are_told_in_few_lines(
    function: str, typed: Typed, golden: Callable[[str, str], None]
) -> None:
    out, err = typed(f"{NET}:{function}", "--target", "arm64", "--emit=asm", status=1)
    assert not out
    assert len(err.splitlines()) <= LINES
    golden(f"cli/{function}", err)
    given = models.load(f"{NET}:{function}")
    with pytest.raises(sepc.ModelError) as raised:
        sepc.compile(given.model, target="arm64", example_inputs=given.inputs)
    assert f"sepc-opt: {raised.value}\n".replace(str(NET.parent), "tests/cli") == err
