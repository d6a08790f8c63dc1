"""Saved models: what goes into a file comes out of it, and nothing else is let in."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sepc
from sepc.cost_model.detect import HostCpu
from sepc.runtime import manifest as manifest_of
from tests.helpers import Function

ROOT = Path(__file__).parents[2]
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Kernels of ours, one of TVM's, and calls of PyTorch with constants, several results and keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = torch.roll(torch.relu(self.conv(x)), 1, 2) * scale
        values, indices = torch.cumsum(y @ self.table, 3).topk(3, dim=-1, largest=True, sorted=True)
        return {"values": values + 1, "both": (indices, [y]), "name": "mixed", "scale": scale}


class Keywords(nn.Module):
    """Arguments by name only."""

    def forward(self, x: torch.Tensor, *, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x * a - b


def same(left: Any, right: Any) -> bool:
    left, left_spec = torch.utils._pytree.tree_flatten(left)
    right, right_spec = torch.utils._pytree.tree_flatten(right)
    pairs = zip(left, right, strict=True)
    return left_spec == right_spec and all(
        torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, torch.Tensor) else a == b for a, b in pairs
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[sepc.CompiledModel, Path]:
    torch.manual_seed(0)
    compiled = sepc.compile(Mixed().eval(), num_threads=2)
    compiled(X[:1], scale=2.0)
    compiled(X.contiguous(memory_format=torch.channels_last))
    compiled(X)
    path = tmp_path_factory.mktemp("saved") / "model.sepc"
    compiled.save(path)
    return compiled, path


def test_a_loaded_model_gives_the_same_results_for_every_call_that_was_compiled(saved: Any) -> None:
    compiled, path = saved
    loaded = sepc.load(path)
    assert {one.kernel for one in loaded.regions} == {"sepc", "tvm", "torch"}
    last = X.contiguous(memory_format=torch.channels_last)
    for args, kwargs in (((X,), {}), ((last,), {}), ((X[:1],), {"scale": 2.0})):
        assert same(loaded(*args, **kwargs), compiled(*args, **kwargs))


def test_a_loaded_model_tells_of_its_regions_and_times_them(saved: Any) -> None:
    compiled, path = saved
    loaded = sepc.load(str(path))
    assert loaded.regions == compiled.regions
    assert loaded.target == compiled.target
    assert (loaded.arena_bytes, loaded.threads) == (compiled.arena_bytes, 2)
    profile = loaded.profile(X, repeats=3)
    assert [row.name for row in profile] == [one.name for one in compiled.regions]
    assert profile.measured_us > 0


@pytest.mark.parametrize(
    "look", [lambda m: m.graph_module, lambda m: m.compile_times, lambda m: m.source(m.regions[0])]
)
def test_what_needs_the_compiler_is_refused(saved: Any, look: Callable[[Any], Any]) -> None:
    with pytest.raises(sepc.SepcError, match=r"does not know[\s\S]*sepc\.compile"):
        look(sepc.load(saved[1]))


def test_other_arguments_are_refused_with_those_that_there_are(saved: Any) -> None:
    loaded = sepc.load(saved[1])
    with pytest.raises(sepc.InputError, match=r"float32\[3, 4, 6, 6\][\s\S]*float32\[2, 4, 6, 6\] channels-last"):
        loaded(X[[0, 0, 1]])
    with pytest.raises(sepc.InputError, match=r"int64[\s\S]*float32\[1, 4, 6, 6\], 2\.0"):
        loaded(X.long())
    with pytest.raises(sepc.InputError, match="calls like"):
        loaded([X])


def test_a_loaded_model_needs_neither_tvm_nor_the_passes(saved: Any, tmp_path: Path) -> None:
    compiled, path = saved
    torch.save({"x": X, "values": compiled(X)["values"]}, tmp_path / "expected.pt")
    code = f"""
import sys, torch, sepc
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.set_num_threads(1)
model = sepc.load({str(path)!r})
assert torch.equal(model(expected["x"])["values"], expected["values"])
assert model.threads == 2
wrong = [name for name in sys.modules if name.partition(".")[0] in ("tvm", "tvm_ffi", "networkx", "timm")]
compiler = ("sepc.passes", "sepc.backends", "sepc.frontend", "sepc.ir.")
wrong += [name for name in sys.modules if name.startswith(compiler) and name != "sepc.ir.element"]
assert not wrong, wrong
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_loaded_model_can_be_saved_again(saved: Any, tmp_path: Path) -> None:
    loaded = sepc.load(saved[1])
    loaded(X)
    loaded.save(tmp_path / "again.sepc")
    assert (tmp_path / "again.sepc").read_bytes() == saved[1].read_bytes()


def test_a_model_for_two_numbers_of_threads_runs_with_that_of_pytorch(tmp_path: Path) -> None:
    compiled = sepc.compile(nn.Linear(8, 8).eval())
    x = torch.randn(3, 8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            compiled(x)
        compiled.save(tmp_path / "model.sepc")
        loaded = sepc.load(tmp_path / "model.sepc")
        for threads, expected in ((1, 1), (2, 2), (3, 2)):
            torch.set_num_threads(threads)
            assert loaded.threads == expected
            assert torch.equal(loaded(x), compiled(x))
    finally:
        torch.set_num_threads(before)


def test_keywords_may_come_in_any_order(tmp_path: Path) -> None:
    model = Keywords().eval()
    x, a, b = torch.randn(3, 4, 4)
    exported = torch.export.export(model, (x,), {"b": b, "a": a})
    for compiled in (sepc.compile(model), sepc.compile(exported)):
        assert torch.allclose(compiled(x, b=b, a=a), x * a - b)
        assert torch.allclose(compiled(x, a=a, b=b), x * a - b)
        assert len(compiled._specializations) == 1
        compiled.save(tmp_path / "model.sepc")
        assert torch.allclose(sepc.load(tmp_path / "model.sepc")(x, b=b, a=a), x * a - b)


def test_nothing_compiled_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(sepc.SepcError, match="Nothing is compiled"):
        sepc.compile(Mixed().eval()).save(tmp_path / "model.sepc")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_named(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(sepc.ArtifactError, match=r"cannot be written[\s\S]*nowhere"):
        saved[0].save(tmp_path / "nowhere" / "model.sepc")


def test_an_operator_outside_of_aten_is_named_when_it_is_saved(tmp_path: Path) -> None:
    with torch.library._scoped_library("sepc_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        compiled = sepc.compile(Function(lambda self, x: torch.ops.sepc_test.twice(x) + 1).eval(), num_threads=1)
        assert torch.equal(compiled(X), X * 2 + 1)
        with pytest.raises(sepc.ArtifactError, match=r"sepc_test\.twice\.default cannot be saved"):
            compiled.save(tmp_path / "model.sepc")
    assert not list(tmp_path.iterdir())


# ---- files that are not as they were saved


def test_a_file_is_a_plain_archive_with_a_checksum_of_every_member(saved: Any) -> None:
    with zipfile.ZipFile(saved[1]) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        names = archive.namelist()
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert all(
            manifest_of.digest(archive.read(name)) == one["blake2b"] for name, one in manifest["members"].items()
        )
    assert sorted(names) == sorted(["manifest.json", *manifest["members"]])
    assert manifest["specializations"] == 3
    assert "avx2" in manifest["cpu_features"]
    assert manifest["versions"].keys() == {"sepc", "torch", "apache-tvm", "apache-tvm-ffi"}


def test_a_truncated_file_is_refused(saved: Any, tmp_path: Path, no_dlopen: None) -> None:
    content = saved[1].read_bytes()
    for size in (0, 10, 1000, len(content) // 2, len(content) - 100, len(content) - 1):
        (tmp_path / "short.sepc").write_bytes(content[:size])
        with pytest.raises(sepc.ArtifactError, match=r"damaged|no artefact"):
            sepc.load(tmp_path / "short.sepc")


@pytest.fixture
def no_dlopen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a library fails."""

    def refuse(library: bytes) -> Any:
        raise AssertionError("a library was loaded")

    monkeypatch.setattr("sepc.runtime.executable._loaded", refuse)


def test_a_flipped_byte_is_noticed_or_does_not_matter(saved: Any, tmp_path: Path) -> None:
    compiled, path = saved
    content, generator = path.read_bytes(), random.Random(0)
    expected, refused = compiled(X), 0
    # Anywhere, and in the directory at the end, where the archive's own structure is.
    places = [generator.randrange(len(content)) for _ in range(40)]
    places += [len(content) - generator.randrange(1, 1500) for _ in range(150)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        (tmp_path / "changed.sepc").write_bytes(changed)
        try:
            loaded = sepc.load(tmp_path / "changed.sepc")
        except sepc.ArtifactError:
            refused += 1
        else:  # Such as the time of a member.
            assert same(loaded(X), expected)
    assert refused > len(places) // 2


def rewritten(path: Path, target: Path, **changes: Callable[[Any], Any]) -> Path:
    """A copy with some members changed as JSON, and with the checksums that belong to that."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, change in changes.items():
        full = {"manifest": "manifest.json", "entry": "0/entry.json"}[name]
        content = json.loads(members[full])
        members[full] = json.dumps(change(content) or content).encode()
    manifest = json.loads(members["manifest.json"])
    if isinstance(manifest, dict) and "members" in manifest:
        for name in manifest["members"].keys() & members.keys():
            content = members[name]
            manifest["members"][name] = {"size_bytes": len(content), "blake2b": manifest_of.digest(content)}
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def test_a_rewritten_file_with_right_checksums_loads(saved: Any, tmp_path: Path) -> None:
    assert same(sepc.load(rewritten(saved[1], tmp_path / "m.sepc"))(X), saved[0](X))


def host_call(entry: Any) -> Any:
    return next(step for step in entry["program"]["steps"] if isinstance(step, dict))


MANIFEST_CHANGES: dict[str, Callable[[Any], Any]] = {
    "format": lambda m: m.update(format="other"),
    "count": lambda m: m.update(specializations=4),
    "many": lambda m: m.update(specializations=10**15),
    "none": lambda m: m.update(specializations=0),
    "member": lambda m: m["members"].pop("0/library.so"),
    "field": lambda m: m.pop("target"),
    "core": lambda m: m["target"].update(llvm_cpu="z80"),
    "list": lambda m: [m],
}
ENTRY_CHANGES: dict[str, Callable[[Any], Any]] = {
    "field": lambda e: e.pop("program"),
    "type": lambda e: e["program"].update(arena_bytes="many"),
    "negative": lambda e: e["program"].update(arena_bytes=-1),
    "constants": lambda e: e["program"].update(constants_bytes=64),
    "arena": lambda e: e["program"].update(arena_bytes=0),
    "block": lambda e: e["program"]["steps"][0][0]["arguments"][0].update(block=99),
    "result": lambda e: e["program"]["results"][0].update(offset=1 << 30),
    "number": lambda e: e["program"]["steps"][0][0].update(number=5),
    "calls": lambda e: e["program"]["calls"].update(region_9=[0, 99]),
    "operator": lambda e: host_call(e)["graph"]["ops"][0].update(function="os.system.default"),
    "value": lambda e: host_call(e)["graph"]["ops"][0].update(args=[{"value": 77}]),
    "inputs": lambda e: host_call(e)["graph"].update(inputs=5),
    "order": lambda e: e["description"].update(order=[3]),
    "signature": lambda e: e["description"]["signature"]["leaves"][0].update(shape=[2, 4, 6, 7]),
    "leaves": lambda e: e["description"]["signature"]["leaves"].append({"value": 1}),
    "unhashable": lambda e: e["description"]["signature"]["leaves"][1].update(value={"list": []}),
    "results": lambda e: e["description"]["results"].update(leaves=[9, 0, 1, 2, 3]),
    "spec": lambda e: e["description"]["results"].update(spec="[1, {}]"),
    "threads": lambda e: e["description"].update(threads=0),
    "many threads": lambda e: e["description"].update(threads=1 << 30),
    "many calls": lambda e: e["program"].update(number_of_calls=1 << 60),
    "deep": lambda e: e["description"]["results"].update(spec="[" * 100_000),
}


@pytest.mark.parametrize("change", MANIFEST_CHANGES)
def test_a_manifest_that_does_not_fit_is_refused(saved: Any, tmp_path: Path, no_dlopen: None, change: str) -> None:
    path = rewritten(saved[1], tmp_path / "changed.sepc", manifest=MANIFEST_CHANGES[change])
    with pytest.raises(sepc.ArtifactError, match="no artefact of sepc, or damaged"):
        sepc.load(path)


@pytest.mark.parametrize("change", ENTRY_CHANGES)
def test_a_program_that_does_not_fit_is_refused(saved: Any, tmp_path: Path, no_dlopen: None, change: str) -> None:
    path = rewritten(saved[1], tmp_path / "changed.sepc", entry=ENTRY_CHANGES[change])
    with pytest.raises(sepc.ArtifactError, match=r"no artefact of sepc, or damaged|no operator"):
        sepc.load(path)


def test_a_compressed_manifest_is_refused(saved: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(saved[1]) as archive, zipfile.ZipFile(tmp_path / "m.sepc", "w") as changed:
        for name in archive.namelist():
            packed = zipfile.ZIP_DEFLATED if name == "manifest.json" else zipfile.ZIP_STORED
            changed.writestr(name, archive.read(name), packed)
    with pytest.raises(sepc.ArtifactError, match=r"manifest\.json is compressed"):
        sepc.load(tmp_path / "m.sepc")


def test_another_version_of_the_format_is_told_apart_from_damage(saved: Any, tmp_path: Path) -> None:
    path = rewritten(saved[1], tmp_path / "new.sepc", manifest=lambda m: {"format": "sepc", "format_version": 3})
    with pytest.raises(sepc.ArtifactError, match="of version 3"):
        sepc.load(path)


def test_what_is_no_artefact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.sepc").write_text("not an archive")
    with zipfile.ZipFile(tmp_path / "other.sepc", "w") as archive:
        archive.writestr("a.txt", "something else")
    for name in ("text.sepc", "other.sepc"):
        with pytest.raises(sepc.ArtifactError, match="no artefact of sepc"):
            sepc.load(tmp_path / name)
    with pytest.raises(sepc.ArtifactError, match="cannot be read"):
        sepc.load(tmp_path / "missing.sepc")
    with pytest.raises(sepc.ArtifactError, match="cannot be read"):
        sepc.load(tmp_path)


def test_a_processor_without_the_features_is_refused_before_anything_is_loaded(
    saved: Any, no_dlopen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = HostCpu(
        "x86-64", "x86-64-v3", frozenset({"avx2", "bmi1", "bmi2", "f16c", "movbe", "popcnt", "abm"}), "x86-64-v3"
    )
    for module in ("sepc.runtime.manifest", "sepc.target"):
        monkeypatch.setattr(f"{module}.host_cpu", lambda: old)
    with pytest.raises(sepc.ArtifactError, match=r"cannot run[\s\S]*lacks[^\n]*fma"):
        sepc.load(saved[1])


def test_a_feature_that_the_manifest_adds_is_looked_for(saved: Any, tmp_path: Path, no_dlopen: None) -> None:
    path = rewritten(saved[1], tmp_path / "m.sepc", manifest=lambda m: m["cpu_features"].append("avx4096"))
    with pytest.raises(sepc.ArtifactError, match=r"lacks avx4096"):
        sepc.load(path)


def test_a_library_that_the_system_cannot_load_is_explained(saved: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(saved[1]) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["0/library.so"] = b"no library"
    manifest = json.loads(members["manifest.json"])
    manifest["members"]["0/library.so"] = {"size_bytes": 10, "blake2b": manifest_of.digest(b"no library")}
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(tmp_path / "m.sepc", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(sepc.ArtifactError, match=r"cannot be loaded[\s\S]*libgomp"):
        sepc.load(tmp_path / "m.sepc")


def test_equal_models_make_equal_files(saved: Any, tmp_path: Path) -> None:
    saved[0].save(tmp_path / "model.sepc")
    assert (tmp_path / "model.sepc").read_bytes() == saved[1].read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["model.sepc"]
