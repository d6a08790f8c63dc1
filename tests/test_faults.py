"""What goes wrong around a compilation or a call: PyTorch takes over with a warning, or there is one clear error."""

from __future__ import annotations

import errno
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sepc
from sepc.backends import build
from sepc.runtime import executable
from tests.helpers import Function
from tests.soak import forked

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    """Kernels of ours, and one of TVM's between."""
    return Function(lambda self, x: torch.roll(self.conv(x).relu(), 1, 2) * 2, conv=nn.Conv2d(4, 4, 3)).eval()


def fail_at(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """TVM fails at these of the kernels, in the order of their names, now and whenever they come again."""
    right, compiled = build.compile_function, sepc.compile(model(), example_inputs=(X,))
    symbols = [symbol for one in compiled.regions for symbol in one.symbols]

    def compile_function(function: Any, target: Any) -> Any:
        if any(symbols[number] == str(function.attrs["global_symbol"]) for number in numbers):
            raise RuntimeError("Traceback ...\nCheck failed: beyond me")
        return right(function, target)

    monkeypatch.setattr(build, "compile_function", compile_function)


@pytest.mark.parametrize("number", [0, 1])
def test_a_kernel_that_cannot_be_compiled_is_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    fail_at(monkeypatch, number)
    torch.manual_seed(0)
    one = model()
    compiled = sepc.compile(one)
    torch.testing.assert_close(compiled(X), one(X).detach(), rtol=1e-4, atol=1e-4)
    assert [region.kernel for region in compiled.regions].count("torch") == 1
    assert "its kernel could not be compiled: Check failed: beyond me" in compiled.regions[number].reason
    assert "runs in PyTorch" in caplog.text
    with pytest.raises(sepc.ModelError, match="beyond me"):
        sepc.compile(model(), fullgraph=True, example_inputs=(X,))


def test_where_no_kernel_can_be_compiled_that_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, *range(4))
    with pytest.raises(sepc.BuildError, match=r"4 of 4 kernels could not be compiled[\s\S]*beyond me"):
        sepc.compile(model(), example_inputs=(X,))


def test_a_model_with_a_kernel_less_is_not_kept_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail_at(monkeypatch, 0)
    monkeypatch.setenv("SEPC_CACHE", "1")
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path))
    sepc.compile(model(), example_inputs=(X,))
    assert not list((tmp_path / "models").iterdir())


def test_a_missing_temporary_directory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with pytest.raises(sepc.BuildError, match=r"could not be written[\s\S]*TMPDIR"):
        sepc.compile(model(), example_inputs=(X,))


def test_a_full_disk_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write(path, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(sepc.BuildError, match=r"No space left on device[\s\S]*free some space"):
            sepc.compile(model(), example_inputs=(X,))
    assert not list(tmp_path.iterdir())
    assert sepc.compile(model())(X).shape == (2, 4, 4, 4)


def test_a_disk_without_room_is_an_error_and_not_the_end_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LLVM itself ends the process where it cannot write."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def on_a_full_disk() -> int:
        if not forked.fill_disk(tmp_path, 4):
            monkeypatch.setattr(tempfile, "tempdir", "/dev/full")  # Only root may mount.
        return forked.compile_and_compare()

    assert forked.run(on_a_full_disk) == forked.REFUSED


def test_a_library_that_finds_no_space_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(executable.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(sepc.ArtifactError, match=r"No space left on device[\s\S]*free some space"):
        sepc.compile(model(), example_inputs=(X,))


def test_no_memory_for_a_call_is_an_error_that_names_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = sepc.compile(model(), example_inputs=(X,))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(executable.mmap, "mmap", refuse)
        with pytest.raises(sepc.OutOfMemoryError, match=rf"no {compiled.arena_bytes} bytes[\s\S]*Cannot allocate"):
            compiled(X)
    assert issubclass(sepc.OutOfMemoryError, sepc.SepcError)
    assert issubclass(sepc.OutOfMemoryError, MemoryError)
    assert compiled(X).shape == (2, 4, 4, 4)


def test_no_memory_for_a_result_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = sepc.compile(model(), example_inputs=(X,))

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(executable.torch, "empty_strided", refuse)
        with pytest.raises(sepc.OutOfMemoryError, match="DefaultCPUAllocator"):
            compiled(X)
    assert compiled(X).shape == (2, 4, 4, 4)


def test_the_calls_after_a_fault_in_pytorch_are_right(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    compiled = sepc.compile(Function(lambda self, x: torch.linalg.inv(x * 2).relu()).eval())
    expected = compiled(X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="singular"):
            compiled(X * 0)
        assert torch.equal(compiled(X), expected)
