"""Exported models: run from NumPy where there is no PyTorch, and refused where they are not what was written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import sepc
from sepc.cost_model.detect import HostCpu
from tests.helpers import TOLERANCE, Function

ROOT = Path(__file__).parents[2]
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "tvm", "tvm_ffi", "jinja2", "networkx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


class Structured(nn.Module):
    """Arguments and results of several types in structures, and a kernel of TVM's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, pair: list[torch.Tensor], *, scale: float, mask: torch.Tensor) -> dict[str, Any]:
        x, y = pair
        z = torch.roll(torch.relu(self.conv(x)), 1, 2) * scale + y.float()
        return {"z": z, "both": (z.sum((2, 3)) > 0, [y]), "name": "structured", "wide": z.mT, "masked": z * mask}


class Pair(NamedTuple):
    """A result whose parts have names."""

    left: torch.Tensor
    right: torch.Tensor


PAIR = [X.contiguous(memory_format=torch.channels_last), torch.arange(6)]
CALL: dict[str, Any] = {"mask": X > 0, "scale": 2.0}


def exported(path: Path, threads: int = 2) -> sepc.ExportedModel:
    compiled = sepc.compile(Structured().eval(), num_threads=threads)
    compiled(PAIR, **CALL)
    compiled.export(path, format="tvm", name="net")
    model = sepc.load(path)
    assert isinstance(model, sepc.ExportedModel)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported")
    exported(path)
    return path


def test_results_have_the_structure_and_the_values_of_the_models(directory: Path) -> None:
    torch.manual_seed(0)
    model = Structured().eval()
    with torch.no_grad():
        expected = model(PAIR, **CALL)
    loaded = sepc.load(directory)
    found = loaded([one.numpy() for one in PAIR], mask=CALL["mask"].numpy(), scale=2.0)
    assert found.keys() == expected.keys()
    assert isinstance(found["both"], tuple)
    assert found["name"] == "structured"
    for name in ("z", "wide", "masked"):
        assert found[name].shape == tuple(expected[name].shape)
        assert np.abs(found[name] - expected[name].numpy()).max() <= TOLERANCE * expected[name].abs().max()
    assert np.array_equal(found["both"][0], expected["both"][0].numpy())
    assert found["both"][1][0].dtype == np.int64
    assert found["both"][1][0] is not PAIR[1]


def test_it_runs_where_neither_torch_nor_tvm_can_be_imported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval()
    compiled = sepc.compile(model, num_threads=1)
    np.save(tmp_path / "y.npy", compiled(X).numpy())
    np.save(tmp_path / "x.npy", X.numpy())
    compiled.export(tmp_path / "out", format="tvm")
    compiled.save(tmp_path / "model.sepc")
    code = f"""{BLOCKED}
import numpy as np, sepc
model = sepc.load("out")
assert np.array_equal(model(np.load("x.npy")), np.load("y.npy"))
assert model.profile(np.load("x.npy"), repeats=3).measured_us > 0
try:
    sepc.load("model.sepc")
except sepc.ArtifactError as error:
    assert "without PyTorch" in str(error) and 'format="tvm"' in str(error)
else:
    raise AssertionError("a saved model cannot be loaded without PyTorch")
assert "torch" not in sys.modules
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)


def test_it_tells_of_its_regions_and_times_them(directory: Path) -> None:
    loaded = sepc.load(directory)
    assert {one.kernel for one in loaded.regions} == {"sepc", "tvm"}
    assert loaded.threads == 2
    assert loaded.arena_bytes > 0
    profile = loaded.profile(PAIR, repeats=3, **CALL)
    assert [row.name for row in profile] == [one.name for one in loaded.regions]
    assert profile.measured_us > 0


def test_results_of_two_calls_are_two(directory: Path) -> None:
    loaded = sepc.load(directory)
    first = loaded(PAIR, **CALL)
    before = first["z"].copy()
    loaded([PAIR[0] + 1, PAIR[1]], **CALL)
    assert np.array_equal(first["z"], before)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (([X], X), CALL, "not those of the exported model"),
        ((PAIR,), {"mask": CALL["mask"], "scale": 3.0}, r"scale=2\.0"),
        ((PAIR,), {"scale": 2.0}, "calls like"),
        (([X[:1], PAIR[1]],), CALL, r"Input 0 is float32\[1, 4, 6, 6\](.|\n)*float32\[2, 4, 6, 6\]"),
        (([X.double(), PAIR[1]],), CALL, "Input 0 is float64"),
    ],
)
def test_other_arguments_are_refused(directory: Path, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(sepc.InputError, match=message):
        sepc.load(directory)(*args, **kwargs)


def copied(directory: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The directory with a changed manifest."""
    for one in directory.iterdir():
        (path / one.name).write_bytes(one.read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "damaged"),
        (lambda m: m.update(format_version=99), "another format"),
        (lambda m: m["members"]["net.so"].update(size_bytes=3), "size"),
        (lambda m: m["members"]["net.so"].update(blake2b="00"), "checksum"),
        (lambda m: m["members"].update({"../net.so": m["members"]["net.so"]}), "elsewhere"),
        (lambda m: m["cpu_features"].append("avx4096"), "lacks avx4096"),
        (lambda m: m["interface"]["results"][0].update(offset=10**6), "outside"),
        (lambda m: m["interface"]["results"][0].update(block=99), "damaged"),
        (lambda m: m["interface"].update(order=[7]), "none of the arguments"),
        (lambda m: m["interface"].update(name="../net"), "lists no library"),
        (lambda m: m["interface"].update(threads="two"), "damaged"),
        (lambda m: m["interface"].pop("calls"), "damaged"),
    ],
)
def test_what_somebody_has_changed_is_refused(
    directory: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(sepc.ArtifactError, match=message):
        sepc.load(copied(directory, tmp_path, change))


def test_a_directory_without_a_manifest_or_library_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(sepc.ArtifactError, match="cannot be read"):
        sepc.load(tmp_path)
    copied(directory, tmp_path, lambda m: None)
    (tmp_path / "net.so").unlink()
    with pytest.raises(sepc.ArtifactError, match="cannot be read"):
        sepc.load(tmp_path)


def test_another_processor_is_refused_before_anything_is_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = HostCpu("x86-64", "x86-64-v3", frozenset({"avx2", "bmi1"}), "x86-64-v3")
    for module in ("sepc.runtime.manifest", "sepc.target"):
        monkeypatch.setattr(f"{module}.host_cpu", lambda: old)
    monkeypatch.setattr("sepc.runtime.exported._loaded", lambda path: pytest.fail("it was loaded"))
    with pytest.raises(sepc.ArtifactError, match=r"cannot run[\s\S]*lacks[^\n]*fma"):
        sepc.load(directory)


def test_a_structure_that_is_more_than_its_elements_is_refused(tmp_path: Path) -> None:
    compiled = sepc.compile(Function(lambda self, x: Pair(x.relu(), x + 1)).eval(), num_threads=1, example_inputs=(X,))
    with pytest.raises(sepc.ArtifactError, match="type Pair cannot be saved"):
        compiled.export(tmp_path, format="tvm")
    assert not list(tmp_path.iterdir())


def test_a_model_can_be_exported_again_while_it_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = exported(tmp_path, 1)
    before = first(PAIR, **CALL)["z"]
    exported(tmp_path, 2)
    assert np.array_equal(first(PAIR, **CALL)["z"], before)
