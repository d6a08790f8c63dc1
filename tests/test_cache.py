"""The cache of compiled models: hits, what its key depends on, and everything that may be wrong with its directory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sepc
from sepc import cache_key as keys
from sepc.cache import Cache
from sepc.frontend.export import export
from sepc.runtime.signature import Signature
from sepc.target import Target
from tests.helpers import Function

ROOT = Path(__file__).parents[1]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def directory(own_cache: Path) -> Path:
    """A cache of this test's own; entries are in this directory."""
    return own_cache


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def came_from_cache(compiled: sepc.CompiledModel) -> bool:
    return list(compiled.compile_times) == ["capture", "cache"]


def test_the_second_compilation_comes_from_the_cache(directory: Path) -> None:
    first, second = (sepc.compile(model(), example_inputs=(X,)) for _ in range(2))
    assert list(first.compile_times) == ["capture", "cache", "imports", "passes", "lower", "kernels", "link"]
    assert came_from_cache(second)
    assert torch.equal(first(X), second(X))
    assert second.regions == first.regions
    assert second.arena_bytes == first.arena_bytes
    assert [row.name for row in second.profile(X, repeats=2)] == [one.name for one in first.regions]
    assert [path.suffix for path in directory.iterdir()] == [".sepc"]
    assert directory.stat().st_mode & 0o777 == 0o700


def test_graph_and_sources_of_a_hit_are_those_of_the_first_compilation(directory: Path) -> None:
    first, second = (sepc.compile(model(), example_inputs=(X,)) for _ in range(2))
    assert torch.equal(first.graph_module(X)[0], second.graph_module(X)[0])
    for region in first.regions:
        assert first.source(region) == second.source(region)
    assert [one.name for one in first._last().lowered.passes] == [one.name for one in second._last().lowered.passes]


def test_a_region_that_failed_the_check_stays_with_pytorch(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sepc.backends import generic_ops

    right = generic_ops.CONVERTERS["roll.default"]

    def wrong(emitter: Any, x: Any, shifts: list[int], dims: tuple[int, ...] = ()) -> Any:
        return right(emitter, x, [one + 1 for one in shifts], dims)

    monkeypatch.setitem(generic_ops.CONVERTERS, "roll.default", wrong)
    rolled = Function(lambda self, x: torch.roll(torch.relu(x), 1, 2) * 2).eval()
    first, second = (sepc.compile(rolled, example_inputs=(X,)) for _ in range(2))
    assert came_from_cache(second)
    assert second.regions == first.regions
    assert second.regions[1].kernel == "torch"
    assert torch.equal(second(X), rolled(X))
    node = next(node for node in second.graph_module.graph.nodes if node.name == second.regions[1].name)
    assert node.meta["sepc_region"].reason == second.regions[1].reason


def test_a_saved_hit_is_what_a_saved_compilation_is(directory: Path, tmp_path: Path) -> None:
    first, second = (sepc.compile(model(), example_inputs=(X,)) for _ in range(2))
    first.save(tmp_path / "first.sepc")
    second.save(tmp_path / "second.sepc")
    assert (tmp_path / "first.sepc").read_bytes() == (tmp_path / "second.sepc").read_bytes()


def test_an_exported_program_comes_from_the_cache_too(directory: Path) -> None:
    for expected in (False, True):
        compiled = sepc.compile(torch.export.export(model(), (X,)), example_inputs=(X,))
        assert came_from_cache(compiled) is expected
        with pytest.raises(sepc.InputError, match="exported for"):
            compiled(X[:1])


def test_another_process_finds_the_kernels_and_loads_no_tvm(directory: Path) -> None:
    code = """
import sys, torch, sepc
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(2)
model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
x = torch.randn(2, 3, 8, 8)
fast = sepc.compile(model)
assert torch.allclose(fast(x), model(x), atol=1e-5)
hit = list(fast.compile_times) == ["capture", "cache"]
fast.profile(x, repeats=2), fast.regions, fast.arena_bytes
wrong = [name for name in sys.modules if name.startswith(("tvm", "sepc.passes", "sepc.backends"))]
print(hit, wrong)
"""
    for expected in ("False", "True []"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(expected)


@pytest.mark.parametrize(
    ("name", "value"), [("SEPC_CACHE", "0"), ("verify_each", True), ("target", "x86:sapphirerapids")]
)
def test_the_cache_is_bypassed(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    options = {} if name.isupper() else {name: value}
    if not options:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Target, "is_runnable", property(lambda self: self.name == "native"))
    for _ in range(2):
        assert "kernels" in sepc.compile(model(), example_inputs=(X,), **options).compile_times
    assert not directory.exists()


# ---- the key


def key(
    module: nn.Module, x: torch.Tensor = X, target: str = "x86-64-v3", threads: int = 2, optimize: str = "time"
) -> Any:
    leaves, spec = torch.utils._pytree.tree_flatten(((x,), {}))
    signature = Signature.of(spec, leaves)
    return keys.cache_key(export(module, (x,)), signature, Target.parse(target), threads, optimize)


def changed_weight() -> nn.Module:
    changed = model()
    with torch.no_grad():
        changed[3].weight[0, 0] += 1e-6
    return changed


def changed_statistics() -> nn.Module:
    changed = model()
    changed[1].running_var[0] += 1e-6
    return changed


def test_the_key_is_the_same_for_the_same_model() -> None:
    assert key(model()) == key(model(), X + 1)


@pytest.mark.parametrize(
    "other",
    [
        lambda: key(changed_weight()),
        lambda: key(changed_statistics()),
        lambda: key(model(), X[:1]),
        lambda: key(model(), X.contiguous(memory_format=torch.channels_last)),
        lambda: key(model(), target="x86-64-v4"),
        lambda: key(model(), threads=1),
        lambda: key(model(), optimize="memory"),
        lambda: key(nn.Sequential(*model()[:2], nn.ReLU6(), model()[3]).eval()),
        lambda: key(nn.Sequential(model(), nn.Identity())),
    ],
    ids=["weight", "buffer", "shape", "strides", "target", "threads", "options", "operator", "names"],
)
def test_the_key_changes_with_whatever_the_kernels_depend_on(other: Callable[[], str]) -> None:
    assert other() != key(model())


def test_the_key_covers_the_figures_of_the_machine_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, spec = torch.utils._pytree.tree_flatten(((X,), {}))
    signature, exported, target = Signature.of(spec, leaves), export(model(), (X,)), Target.parse("x86-64-v3")
    faster = replace(target, machine=replace(target.machine, clock_ghz=target.machine.clock_ghz + 0.1))
    found = {keys.cache_key(exported, signature, one, 1, "time") for one in (target, faster)}
    monkeypatch.setattr(keys, "versions", lambda: {"torch": "0"})
    found.add(keys.cache_key(exported, signature, target, 1, "time"))
    monkeypatch.setattr(keys, "SOURCES_DIGEST", "edited")
    found.add(keys.cache_key(exported, signature, target, 1, "time"))
    monkeypatch.setenv("CC", "clang-99")
    found.add(keys.cache_key(exported, signature, target, 1, "time"))
    assert len(found) == 5


def test_the_key_covers_the_type_that_kernels_compute_in() -> None:
    leaves, spec = torch.utils._pytree.tree_flatten(((X,), {}))
    signature, exported, target = Signature.of(spec, leaves), export(model(), (X,)), Target.parse("arm64:cortex-a76")
    targets = (target, target.computing_in("float32"), target.computing_in("float16"))
    first, same, other = (keys.cache_key(exported, signature, one, 1, "time") for one in targets)
    assert first == same != other


def test_numbers_are_told_apart_by_type_in_the_key() -> None:
    scaled = [Function(lambda self, x, by=by: x * by).eval() for by in (1, 1.0, True, 2)]
    assert len({key(one) for one in scaled}) >= 3  # export itself takes True for 1


def test_a_model_without_a_text_has_no_key_and_compiles(directory: Path) -> None:
    from collections import namedtuple

    pair = namedtuple("Pair", "a b")
    twice = Function(lambda self, x: pair(x * 2, x + 1)).eval()
    assert key(twice) is None
    for _ in range(2):
        assert torch.equal(sepc.compile(twice)(X).b, X + 1)
    assert not list(directory.iterdir())


def test_the_sources_are_part_of_the_key() -> None:
    assert keys.read_sources_digest() == keys.read_sources_digest()
    assert len(keys.SOURCES_DIGEST) == 40


def test_kernels_of_edited_sources_are_not_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.cache.read_sources_digest", lambda: "edited")
    sepc.compile(model(), example_inputs=(X,))
    assert not list(directory.iterdir())


# ---- the directory


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-7], lambda content: b"", lambda content: content[:500] * 9]
)
def test_a_damaged_entry_is_replaced(directory: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    sepc.compile(model(), example_inputs=(X,))
    (path,) = directory.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING, "sepc"):
        assert not came_from_cache(sepc.compile(model(), example_inputs=(X,)))
    assert "made anew" in caplog.text
    assert path.read_bytes() == content
    assert came_from_cache(sepc.compile(model(), example_inputs=(X,)))


def test_an_entry_of_another_model_is_replaced(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    sepc.compile(model(), example_inputs=(X,))
    (path,) = directory.iterdir()
    other = sepc.compile(changed_weight(), example_inputs=(X,))
    (foreign,) = set(directory.iterdir()) - {path}
    for content in (foreign.read_bytes(), _saved(other, directory.parent)):
        path.write_bytes(content)
        again = sepc.compile(model(), example_inputs=(X,))
        assert not came_from_cache(again)
        assert "of another compilation" in caplog.text
        torch.testing.assert_close(again(X), model()(X), rtol=1e-4, atol=1e-4)
        assert came_from_cache(sepc.compile(model(), example_inputs=(X,)))


def _saved(compiled: sepc.CompiledModel, directory: Path) -> bytes:
    compiled.save(directory / "model.sepc")
    return (directory / "model.sepc").read_bytes()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_to_is_not_used(
    directory: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    directory.mkdir()
    directory.chmod(mode)
    assert "kernels" in sepc.compile(model(), example_inputs=(X,)).compile_times
    assert "other users may write" in caplog.text
    assert not list(directory.iterdir())


def test_a_directory_of_another_user_is_not_used(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert Cache.open() is None
    assert "belongs to another user" in caplog.text


def test_a_directory_that_others_may_rename_is_not_used(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = directory.parent / "open" / "cache"
    place.mkdir(parents=True)
    monkeypatch.setenv("SEPC_CACHE_DIR", str(place))
    place.parent.chmod(0o777)
    assert Cache.open() is None
    assert f"other users may write to {place.parent}" in caplog.text
    place.parent.chmod(0o1777)  # As /tmp is: others may not rename what is not theirs.
    assert Cache.open() is not None


def test_a_directory_that_cannot_be_made_is_a_warning(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.parent.joinpath("file").touch()
    monkeypatch.setenv("SEPC_CACHE_DIR", str(directory.parent / "file"))
    assert Cache.open() is None
    assert "no cache of models in" in caplog.text


def test_a_full_disk_is_a_warning(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sepc.runtime.artifact._write", full)
    compiled = sepc.compile(model(), example_inputs=(X,))
    assert compiled(X).shape == (2, 4, 6, 6)
    assert "No space left on device" in caplog.text
    assert not list(directory.iterdir())


def test_the_least_recently_used_entries_go(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (8, 9, 10)
    inputs = [torch.randn(1, 3, size, size) for size in sizes]
    for age, x in zip((300, 200), inputs[:2], strict=True):
        sepc.compile(model(), example_inputs=(x,))
        newest = max(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (newest.stat().st_mtime - age,) * 2)
    assert came_from_cache(sepc.compile(model(), example_inputs=(inputs[0],)))  # now used later than the other one
    one = max(path.stat().st_size for path in directory.iterdir())
    stale = directory / ".killed.sepc.1234.tmp"
    stale.touch()
    os.utime(stale, (1, 1))
    monkeypatch.setenv("SEPC_CACHE_SIZE", str(2 * one + one // 2))
    sepc.compile(model(), example_inputs=(inputs[2],))
    assert len(list(directory.iterdir())) == 2
    # The last of these compiles again, and has another one go.
    hits = [came_from_cache(sepc.compile(model(), example_inputs=(inputs[index],))) for index in (0, 2, 1)]
    assert hits == [True, True, False]


def test_a_size_that_is_no_number_is_a_warning(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPC_CACHE_SIZE", "2 GiB")
    cache = Cache.open()
    assert cache is not None
    assert cache.size_bytes == 2 << 30
    assert "is no number of bytes" in caplog.text
