"""A failure inside a pass: one directory has all of it, whose command fails in the same place."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import sepc
from sepc.cli.opt import main
from sepc.passes import registry
from sepc.passes.fuse import Fuse
from sepc.passes.manager import PassContext

ROOT = Path(__file__).parents[2]
X = torch.randn(1, 3, 8, 8)
BROKEN = """
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Broken:
    name: ClassVar[str] = "broken"
    most: int = 0

    def run(self, graph_module, context):
        return {}[graph_module.graph.output_node().name, self.most]
"""
NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(1, 3, 8, 8)
"""
# What Python runs before anything else: the patch of the tests below, in another process.
PATCH = """
from sepc.passes.fuse import Fuse

def run(self, graph_module, context):
    raise KeyError("nothing to fuse", context.threads, self.objective)

Fuse.run = run
"""


class Scaled(nn.Module):
    """A model with an argument by name, and one that is not dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        return torch.relu(self.conv(x)) * scale


def fail(self: Fuse, graph_module: fx.GraphModule, context: PassContext) -> bool:
    raise KeyError("nothing to fuse", context.threads, self.objective)


def directory_of(text: str) -> Path:
    """The directory that an error names."""
    found = re.search(r"look into (\S+)/index\.html", text)
    assert found is not None
    return Path(found[1])


def repeat(directory: Path, path: Path) -> str:
    """What the command of the directory prints on standard error, in another process with `path` for imports."""
    words = shlex.split((directory / "repeat.sh").read_text().splitlines()[-1])
    assert words[0] == "sepc-opt"
    command = [sys.executable, "-m", "sepc.cli.opt", *words[1:]]
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(path))
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is searched for packages, with one whose pass fails."""
    site = tmp_path / "site"
    metadata = site / "broken-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.GROUP}]\nbroken = broken:Broken\n")
    (site / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(site))
    return site


def test_a_pass_of_another_package_that_fails_leaves_all_of_it(
    site: Path, temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NET)
    assert main([f"{tmp_path / 'net.py'}:make", "--passes", "canonicalize,group,broken{most=3},fuse"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sepc-opt: broken failed.\n  Why: KeyError: ('output', 3)\n  What to do: look into ")
    assert len(error.splitlines()) <= 10
    directory = directory_of(error)
    assert directory.parent == temporary
    assert {"000_input.py", "002_group.py", "traceback.txt", "input.pt2", "repeat.sh"} <= {
        path.name for path in directory.iterdir()
    }
    assert 'broken.py", line 12, in run' in (directory / "traceback.txt").read_text()
    script = (directory / "repeat.sh").read_text()
    assert "# broken fails in this; the graph before it is in 002_group.py." in script
    assert "--passes 'canonicalize,group,broken{most=3}'" in script
    page = (directory / "index.html").read_text()
    assert "<h2>broken failed</h2>" in page
    assert "sepc-opt /" in page
    assert repeat(directory, site) == error


def test_with_a_dump_what_is_left_is_in_its_directory(
    site: Path, temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NET)
    directory = tmp_path / "ir"
    assert main([f"{tmp_path / 'net.py'}:make", "--passes", "broken", f"--dump-ir={directory}"]) == 1
    assert directory_of(capsys.readouterr().err) == directory
    assert not list(temporary.iterdir())
    assert (directory / "traceback.txt").exists()


@pytest.mark.parametrize("has_dump", [False, True])
def test_compile_names_the_directory_and_its_command_fails_in_the_same_place(
    has_dump: bool, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fuse, "run", fail)
    dump_dir = tmp_path / "ir" if has_dump else None
    compiled = sepc.compile(Scaled(), target="x86-64-v3", num_threads=2, optimize="memory", dump_dir=dump_dir)
    with pytest.raises(
        sepc.PassError, match=r"fuse failed(.|\n)*KeyError: \('nothing to fuse', 2, 'memory'\)"
    ) as raised:
        compiled(X.contiguous(memory_format=torch.channels_last), scale=2.0)
    assert isinstance(raised.value.__cause__, KeyError)
    directory = directory_of(str(raised.value))
    assert directory == dump_dir if has_dump else directory.parent == temporary
    assert "in fail" in (directory / "traceback.txt").read_text()
    assert "channels_last" in (directory / "000_input.py").read_text()
    (tmp_path / "sitecustomize.py").write_text(PATCH)
    again = repeat(directory, tmp_path)
    assert again == f"sepc-opt: {raised.value}\n".replace(str(directory), str(directory.resolve()))


def test_a_pass_that_changes_the_result_is_kept_as_well(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Fuse, graph_module: fx.GraphModule, context: PassContext) -> bool:
        (result,) = graph_module.graph.output_node().args[0]
        graph_module.graph.output_node().args = ((result.args[0],),)
        return True

    monkeypatch.setattr(Fuse, "run", wrong)
    with pytest.raises(sepc.VerificationError, match="fuse changed the") as raised:
        sepc.compile(nn.ReLU(), verify_each=True, example_inputs=(X,))
    assert "--verify-each" in (directory_of(str(raised.value)) / "repeat.sh").read_text()


def test_a_program_that_cannot_be_written_is_told_and_the_rest_is_there(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no such\ntype")

    monkeypatch.setattr(Fuse, "run", fail)
    monkeypatch.setattr("torch.export.save", refuse)
    with pytest.raises(sepc.PassError) as raised:
        sepc.compile(nn.Conv2d(3, 4, 1).eval(), example_inputs=(X,))
    directory = directory_of(str(raised.value))
    assert "The program could not be written: no such type" in (directory / "repeat.sh").read_text()
    assert (directory / "traceback.txt").exists()


def test_where_nothing_can_be_written_the_error_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fuse, "run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(sepc.PassError, match="fuse failed") as raised:
        sepc.compile(nn.Conv2d(3, 4, 1).eval(), example_inputs=(X,))
    assert f"nothing could be kept of it, as {tmp_path / 'missing'}/sepc-failure-" in raised.value.fix


def test_what_fails_only_once_is_kept_with_its_traceback(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def fail_once(self: Fuse, graph_module: fx.GraphModule, context: PassContext) -> bool:
        runs.append(self)
        if len(runs) == 1:
            raise KeyError("the first time")
        return False

    monkeypatch.setattr(Fuse, "run", fail_once)
    with pytest.raises(sepc.PassError) as raised:
        sepc.compile(nn.Conv2d(3, 4, 1).eval(), example_inputs=(X,))
    assert "the first time" in (directory_of(str(raised.value)) / "traceback.txt").read_text()


def test_an_error_outside_of_passes_goes_its_way(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sepc.passes.manager.tolerance_of", refuse)
    with pytest.raises(ZeroDivisionError):
        sepc.compile(nn.ReLU(), example_inputs=(X,))
