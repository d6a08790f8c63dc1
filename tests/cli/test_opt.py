"""`sepc-opt`, called in this process as the console script calls it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from sepc.cli import models
from sepc.cli.opt import main
from sepc.errors import InputError, ModelError
from sepc.passes.fuse import Fuse
from sepc.passes.pipeline import PASSES, PIPELINE, pipeline
from sepc.passes.selection import parse_passes, pass_text

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1)
    return nn.Sequential(*layers), torch.randn(1, 3, 8, 8)

def bare():
    return make()[0]

def number():
    return 1
"""


def headings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the printed programs say that they are."""
    lines = capsys.readouterr().out.splitlines()
    return [line[2:].partition(". Run this file")[0] for line in lines if line.startswith("# ")]


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def test_by_default_the_graph_after_all_passes_is_printed_as_python(
    net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{net}:make"]) == 0
    out = capsys.readouterr().out
    assert [one.name for one in ast.parse(out).body if isinstance(one, ast.FunctionDef)] == ["forward"]
    assert " µs, bound by " in out


def test_the_ir_is_printed_before_and_after_the_passes_named(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--print-ir-before", "group", "--print-ir-after", "group", "--print-ir-after", "demote"]
    assert main([f"{net}:make", *options]) == 0
    assert headings(capsys) == ["After demote, which changed nothing", "Before group", "After group"]


def test_after_change_leaves_out_passes_that_changed_nothing(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{net}:make", "--print-ir-after-change"]) == 0
    found = headings(capsys)
    assert "After fold-batch-norm" in found
    assert "After choose-tiling" in found
    assert len(found) < len(PIPELINE)


def test_before_a_failure_the_ir_is_printed(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The memory planner wants tilings of regions, which there are none of.
    assert main([f"{net}:make", "--passes", "choose-tiling,plan-memory", "--print-ir-after-failure"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("# Before plan-memory, which failed. ")
    assert "def forward(" in captured.out
    assert captured.err.startswith("sepc-opt: ")


def test_timing_and_statistics_have_a_line_per_pass(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{net}:make", "--timing", "--statistics"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1 : len(PIPELINE) + 1]] == [one.name for one in PIPELINE]
    assert "1 × taken: folded into the weights before it" in out


@pytest.mark.parametrize(("emit", "start"), [("dot", "digraph"), ("svg", "<?xml")])
def test_a_picture_is_written(net: Path, tmp_path: Path, emit: str, start: str) -> None:
    path = tmp_path / "out" / f"graph.{emit}"
    assert main([f"{net}:make", f"--emit={emit}", "-o", str(path)]) == 0
    assert path.read_text().startswith(start)


def test_without_graphviz_a_picture_is_refused_with_what_to_install(
    net: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main([f"{net}:make", "--passes=group", "--emit=svg"]) == 1
    assert "Graphviz is not installed" in capsys.readouterr().err


def test_results_are_compared_after_each_pass_unless_that_is_turned_off(
    net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"{net}:make", "--timing", "--stop-after", "fold-batch-norm"]
    differs = re.compile(r"^fold-batch-norm .* \d\.\de[+-]\d\d$", re.MULTILINE)
    assert main(command) == 0
    assert differs.search(capsys.readouterr().out)
    assert main([*command, "--no-verify-each"]) == 0
    assert not differs.search(capsys.readouterr().out)


@pytest.mark.parametrize(("emit", "expected"), [("tirx", "@T.prim_func"), ("llvm", "define "), ("asm", "fmla\tv")])
def test_kernels_are_written_for_a_foreign_target(net: Path, tmp_path: Path, emit: str, expected: str) -> None:
    path = tmp_path / "kernels"
    assert main([f"{net}:make", "--target=arm64", f"--emit={emit}", "-o", str(path)]) == 0
    assert expected in path.read_text()


@pytest.mark.parametrize(("emit", "expected"), [("cuda", "__global__"), ("opencl", "__kernel"), ("tirx", "prim_func")])
def test_kernels_of_a_gpu_are_written_without_one(net: Path, tmp_path: Path, emit: str, expected: str) -> None:
    path = tmp_path / "kernels"
    assert main([f"{net}:make", "--target=opencl", f"--emit={emit}", "-o", str(path)]) == 0
    assert expected in path.read_text()


def test_a_report_is_a_page(net: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert main([f"{net}:make", "--emit=report", "-o", str(path)]) == 0
    assert "<html" in path.read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--passes", "fold-batchnorm"], "did you mean 'fold-batch-norm'?"),
        (["--passes", "fuse{objectiv=time}"], "did you mean 'objective'?"),
        (["--passes", "fuse{objective=speed}"], "known are memory, time"),
        (["--passes", "fuse{objective}"], "write fuse{objective=VALUE}"),
        (["--passes", "fuse{"], "is no list of passes"),
        (["--print-ir-after", "grup"], "did you mean 'group'?"),
        (["--stop-after", "fusee"], "did you mean 'fuse'?"),
        (["--target", "arm46"], "did you mean"),
        (["--input", "1x3xa"], "write 1x3x224x224"),
        (["--input", "1x3:float31"], "there is no type 'float31'"),
        (["--emit=asm", "--passes", "fuse"], "does not go with a choice of passes"),
        (["--emit=report"], "give it with -o FILE"),
        (["--emit=pt2"], "give it with -o FILE"),
        (["--dtype=float31"], 'give "float32" or "float16"'),
    ],
)
def test_wrong_arguments_are_one_error_that_says_what_to_do(
    net: Path, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{net}:make", *options]) == 1
    err = capsys.readouterr().err
    assert expected in err
    assert len(err.splitlines()) <= 10


@pytest.mark.parametrize(("option", "suggested"), [("--dumpir", "--dump-ir"), ("--time", "--timing")])
def test_an_unknown_option_is_suggested_for(option: str, suggested: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["net.py:make", f"{option}x"])
    assert f"did you mean '{suggested}'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("net", "names no model"),
        ("missing.py:make", "no such Python file"),
        ("missing.pt2", "cannot be read"),
        ("timm:mobilenetv2_10", "did you mean 'mobilenetv2_1"),
        ("torchvision:mobilenetv2", "did you mean 'mobilenet_v2'?"),
    ],
)
def test_models_that_are_not_there_are_named(model: str, expected: str) -> None:
    with pytest.raises((InputError, ModelError), match=expected.replace("?", r"\?")):
        models.load(model)


def test_a_damaged_program_is_told_without_what_pytorch_says_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"nothing")
    assert main([str(path)]) == 1
    assert capsys.readouterr().err == (
        f"sepc-opt: The exported program cannot be read.\n  Where: {path}\n  Why: File is not a zip file\n"
    )
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_functions_result_that_is_no_model_is_told(net: Path) -> None:
    with pytest.raises(InputError, match="it returns int"):
        models.load(f"{net}:number", ["1x3x8x8"])
    with pytest.raises(InputError, match="has no inputs"):
        models.load(f"{net}:bare")
    with pytest.raises(InputError, match="no function 'made'"):
        models.load(f"{net}:made")


def test_a_function_or_a_file_that_fails_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.py"
    path.write_text("def make():\n    return 1 / 0\n")
    assert main([f"{path}:make"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"sepc-opt: The function makes no model.\n  Where: {path}:2: return 1 / 0\n")
    assert "Why: ZeroDivisionError: division by zero\n" in err
    path.write_text("import no_such_package\n")
    assert main([f"{path}:make"]) == 1
    assert f"Where: {path}:1: import no_such_package" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_told(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{net}:make", "--passes=group", "--emit=ir", "-o", str(net / "graph.py")]) == 1
    assert capsys.readouterr().err.startswith(f"sepc-opt: {net} cannot be written: ")


def test_inputs_on_the_command_line_come_first(net: Path) -> None:
    given = models.load(f"{net}:make", ["2x3x4x4", "1x5:int64"])
    assert [(one.shape, one.dtype) for one in given.inputs] == [((2, 3, 4, 4), torch.float32), ((1, 5), torch.int64)]


def test_an_exported_program_brings_its_inputs(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = models.load(f"{net}:make")
    assert isinstance(given.model, torch.nn.Module)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(given.model, given.inputs), path)
    assert main([str(path), "--passes=canonicalize"]) == 0
    assert "batch_norm.default" in capsys.readouterr().out


def test_keywords_of_an_exported_program_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    path, inputs = tmp_path / "net.pt2", (torch.randn(1, 3, 8, 8),)
    torch.export.save(torch.export.export(Scaled(), inputs, {"scale": torch.randn(8)}), path)
    assert main([str(path)]) == 0
    assert "def forward(self, x, scale):" in capsys.readouterr().out


def test_an_optimised_program_gives_the_same_results(net: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "net.pt2"
    assert main([f"{net}:make", "--emit=pt2", "-o", str(path)]) == 0
    given, program = models.load(f"{net}:make"), torch.export.load(path)
    assert isinstance(given.model, torch.nn.Module)
    torch.testing.assert_close(program.module()(*given.inputs), given.model(*given.inputs))
    assert "batch_norm" not in program.graph_module.code
    assert torch.equal(models.load(str(path)).inputs[0], given.inputs[0])


def test_passes_take_options_and_keep_their_order() -> None:
    passes = parse_passes("group, fuse{objective=memory},plan-memory")
    assert [one.name for one in passes] == ["group", "fuse", "plan-memory"]
    assert passes[1] == Fuse(objective="memory")


def test_the_text_of_passes_gives_them_again() -> None:
    text = "group,fuse{objective=memory},plan-memory"
    assert ",".join(map(pass_text, parse_passes(text))) == text
    assert all(parse_passes(pass_text(one)) == (one,) for one in (*PIPELINE, *pipeline("memory")))


def test_all_passes_are_listed_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-passes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PASSES)
    assert all(len(line.split()) > 3 for line in lines)
