"""Trials of files that are not as they were written: each ends in one SepcError, or it does not matter."""

from __future__ import annotations

import json
import random
import tempfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sepc
from sepc.cli.models import load as load_named
from sepc.runtime.manifest import MANIFEST, digest
from tests.soak.outcome import Outcome

PER_TRIAL = 40
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
Change = Callable[[bytearray, random.Random], bytearray]


class Mixed(nn.Module):
    """Kernels of ours, one of TVM's, and a call of PyTorch with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.roll(torch.relu(self.conv(x)), 1, 2)
        return y, torch.cumsum(y @ self.table, 3)


def flip(content: bytearray, generator: random.Random) -> bytearray:
    """Some bits are others."""
    for _ in range(generator.choice([1, 1, 2, 8])):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return content


def flip_at_the_end(content: bytearray, generator: random.Random) -> bytearray:
    """A bit of the archive's own directory is another."""
    content[-1 - generator.randrange(min(len(content), 800))] ^= 1 << generator.randrange(8)
    return content


def truncate(content: bytearray, generator: random.Random) -> bytearray:
    """The end is missing."""
    return content[: generator.randrange(len(content))]


def swap(content: bytearray, generator: random.Random) -> bytearray:
    """Two sections have changed places."""
    a, b, c = sorted(generator.randrange(len(content)) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def drop(content: bytearray, generator: random.Random) -> bytearray:
    """A section is missing."""
    a, b = sorted(generator.randrange(len(content)) for _ in range(2))
    return content[:a] + content[b:]


def repeat(content: bytearray, generator: random.Random) -> bytearray:
    """A section is there twice."""
    a, b = sorted(generator.randrange(len(content)) for _ in range(2))
    return content[:b] + content[a:]


def blank(content: bytearray, generator: random.Random) -> bytearray:
    """A section is zeros, as after a crash of the system."""
    a, b = sorted(generator.randrange(len(content)) for _ in range(2))
    content[a:b] = bytes(b - a)
    return content


CHANGES: tuple[Change, ...] = (flip, flip, flip_at_the_end, truncate, swap, drop, repeat, blank)
HOSTILE = (
    None,
    True,
    -1,
    0,
    2**63,
    -(2**63),
    10**400,
    1e308,
    "",
    "x" * 1000,
    "../../etc/passwd",
    [],
    [[]],
    {},
    "os.system",
)
HOSTILE_KEYS = ("value", "tuple", "dict", "dtype", "device", "__class__", "default_factory_module", "float")


@lru_cache(maxsize=1)
def originals() -> tuple[dict[str, bytes], dict[str, dict[str, bytes]], Any]:
    """Files of each kind by name, directories by name, and the model's results."""
    torch.manual_seed(0)
    model = Mixed().eval()
    compiled = sepc.compile(model, num_threads=1, example_inputs=(X,))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        compiled.save(place / "model.sepc")
        torch.export.save(torch.export.export(model, (X,)), place / "model.pt2")
        sepc.Plan({}, {"0.weight": torch.randn(8, 4, 3, 3)}).save(place / "model.plan")
        plain = sepc.compile(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval(), num_threads=1, example_inputs=(X,))
        plain.export(place / "exported", format="tvm")
        files = {one.name: one.read_bytes() for one in place.iterdir() if one.is_file()}
        directories = {"exported": {one.name: one.read_bytes() for one in (place / "exported").iterdir()}}
    return files, directories, compiled(X)


READERS: dict[str, Callable[[Path], Any]] = {
    "model.sepc": sepc.load,
    "model.pt2": lambda path: load_named(str(path)),
    "model.plan": sepc.Plan.load,
}


def malformed_files(number: int, directory: Path) -> Outcome:
    """Files of each kind, changed as disks, networks and strangers do."""
    outcome, generator = Outcome(), random.Random(number)
    files, directories, expected = originals()
    for _ in range(PER_TRIAL):
        name = generator.choice([*files, *directories])
        path = directory / name
        if name in files:
            _write(path, _changed(files[name], generator))
            _read(outcome, f"{name} {number}", path, READERS[name], expected if name == "model.sepc" else None)
        else:
            path.mkdir(exist_ok=True)
            victim = generator.choice(sorted(directories[name]))
            for own, content in directories[name].items():
                _write(path / own, _changed(content, generator) if own == victim else content)
            _read(outcome, f"{name}/{victim} {number}", path, sepc.load, None)
        outcome.counts["malformed files"] += 1
    return outcome


def hostile_json(number: int, directory: Path) -> Outcome:
    """Saved models whose JSON says something else, with the checksums that belong to that. They are not run: a file
    holds machine code, and these are from a stranger.
    """
    outcome, generator = Outcome(), random.Random(number)
    files, directories, _ = originals()
    (directory / "archive").write_bytes(files["model.sepc"])
    with zipfile.ZipFile(directory / "archive") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(PER_TRIAL):
        victim = generator.choice([MANIFEST, "0/entry.json", "0/entry.json"])
        _write(directory / "model.sepc", _forged(members, victim, generator, directory / "forged"))
        _read(outcome, f"forged {victim} {number}", directory / "model.sepc", sepc.load, None)
        exported = directory / "exported"
        exported.mkdir(exist_ok=True)
        for own, content in directories["exported"].items():
            changed = json.dumps(_other(json.loads(content), generator)).encode() if own == MANIFEST else content
            _write(exported / own, changed)
        _read(outcome, f"forged exported manifest {number}", exported, sepc.load, None)
        outcome.counts["malformed files"] += 2
    return outcome


def _forged(members: dict[str, bytes], victim: str, generator: random.Random, path: Path) -> bytes:
    changed = dict(members)
    changed[victim] = json.dumps(_other(json.loads(members[victim]), generator)).encode()
    if victim != MANIFEST:
        manifest = json.loads(members[MANIFEST])
        manifest["members"][victim] = {"size_bytes": len(changed[victim]), "blake2b": digest(changed[victim])}
        changed[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in changed.items():
            archive.writestr(name, content)
    return path.read_bytes()


def _other(value: Any, generator: random.Random) -> Any:
    """`value` with something in it replaced, taken away or added."""
    inside = generator.random() < 0.95
    if isinstance(value, dict) and value and inside:
        key = generator.choice(list(value))
        changed = [{**value, key: _other(value[key], generator)}] * 10
        without = {name: one for name, one in value.items() if name != key}
        return generator.choice([*changed, without, {**value, generator.choice(HOSTILE_KEYS): "x"}])
    if isinstance(value, list) and value and inside:
        index = generator.randrange(len(value))
        before, own, after = value[:index], value[index], value[index + 1 :]
        changed = [[*before, _other(own, generator), *after]] * 10
        return generator.choice([*changed, before + after, before + [own] * generator.choice([2, 100]) + after])
    if type(value) is int and generator.random() < 0.5:
        return value + generator.choice([-1, 1, 64, 1 << 20, 1 << 40])
    return generator.choice(HOSTILE)


def _changed(content: bytes, generator: random.Random) -> bytes:
    return bytes(generator.choice(CHANGES)(bytearray(content), generator)) if content else b"x"


def _write(path: Path, content: bytes) -> None:
    # A new file each time: libraries of those before may be mapped.
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _read(outcome: Outcome, what: str, path: Path, read: Callable[[Path], Any], expected: Any) -> None:
    """Read a file: refused by a SepcError, or as good as new, which a model shows by its results."""
    print(what, flush=True)  # The last words, should it crash.
    try:
        found = read(path)
    except sepc.SepcError:
        outcome.counts["malformed files, refused"] += 1
        return
    except Exception as error:
        outcome.check(False, f"{what}: {type(error).__name__}: {error}"[:300])
        return
    if expected is not None:
        same = all(torch.equal(one, other) for one, other in zip(found(X), expected, strict=True))
        outcome.check(same, f"{what}: other results")
