"""`sepc cache`: what it says of the cache, whatever state that is in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc.cache_store import Blobs
from sepc.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory(own_cache: Path) -> Path:
    """A cache of this test's own, with two models in it."""
    for size in (3, 4):
        sepc.compile(nn.ReLU().eval(), example_inputs=(torch.randn(size),))
    return own_cache


def test_status_tells_what_there_is(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "status"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["directory"] == str(directory)
    assert lines["models"] == "2"
    assert lines["size"].endswith("of 2147.5 MB")


def test_status_of_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEPC_CACHE", "1")
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path / "none"))
    assert main(["cache", "status"]) == 0
    assert "yes, from the first compilation on" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("SEPC_CACHE", "0")
    main(["cache", "status"])
    assert "no: SEPC_CACHE is 0" in capsys.readouterr().out


def test_status_tells_why_a_cache_is_not_used(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory.chmod(0o777)
    main(["cache", "status"])
    assert "no: other users may write to it" in capsys.readouterr().out


def test_verify_names_what_is_damaged(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify"]) == 0
    assert capsys.readouterr().out == "2 models, 0 damaged or of another version\n"
    path = min(directory.iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["cache", "verify"]) == 1
    out = capsys.readouterr().out
    assert str(path) in out
    assert "2 models, 1 damaged or of another version: they will be compiled anew when asked for" in out


def test_machine_code_of_gpus_is_looked_after_too(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Blobs.open()
    assert store is not None
    for key in ("one", "other"):
        store.write(key, key.encode())
    assert (store.read("one"), store.read("none")) == (b"one", None)
    path = store.path("other")
    path.write_bytes(path.read_bytes()[:-1])
    assert store.read("other") is None
    assert main(["cache", "verify"]) == 1
    out = capsys.readouterr().out
    assert f"{path}: its checksum is wrong" in out
    assert "2 cubins, 1 damaged" in out
    main(["cache", "status"])
    assert "cubins     2" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert not store.entries()
    assert "2 models deleted" in capsys.readouterr().out


def test_clear_deletes_everything_but_what_others_are_writing(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / ".other.sepc.1234.tmp").touch()
    assert main(["cache", "clear"]) == 0
    assert "2 models deleted" in capsys.readouterr().out
    assert [path.name for path in directory.iterdir()] == [".other.sepc.1234.tmp"]


def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").touch()
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path))
    assert main(["cache", "clear"]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_an_unknown_command_is_refused_before_pytorch_is_loaded() -> None:
    code = "import sys; from sepc.cli.main import parser; parser().print_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    with pytest.raises(SystemExit):
        main(["cache", "delete"])
