"""The file that compiled models are kept in: see docs/artefact.md.

A zip archive without compression: `manifest.json`, and per specialisation a directory with its description as JSON, its
library, its constants and the tensors of its calls of PyTorch. Nothing in it is unpickled or unpacked to a path that it
names. All of it is checked before the library is loaded; but what the library does cannot be checked, so load only
files that you would run.
"""

from __future__ import annotations

import json
import secrets
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final

import numpy as np
import torch

from sepc.errors import ArtifactError, SepcError
from sepc.runtime.encoding import Decoder, Encoder
from sepc.runtime.executable import Executable, aligned_bytes
from sepc.runtime.manifest import (
    MALFORMED,
    MANIFEST,
    Heading,
    Member,
    damaged,
    heading_of,
    require_format,
    unreadable,
)
from sepc.runtime.program import Program
from sepc.runtime.soundness import require_sound
from sepc.runtime.specialization import Description, Specialization
from sepc.target import Target

FORMAT: Final = "sepc"
UNFINISHED: Final = ".tmp"
FORMAT_VERSION: Final = 2


@dataclass(frozen=True)
class Manifest(Heading):
    """What a file begins with.

    Attributes:
        specializations: how many there are.
        key: what the cache knows the file by; empty if it is not of the cache.
    """

    specializations: int
    key: str


@dataclass(frozen=True)
class Entry:
    """What a specialisation's JSON holds."""

    description: Description
    program: Program


def save(path: Path, target: Target, specializations: Iterable[Specialization], key: str = "") -> None:
    """Write an artefact to `path`, whole or not at all; `key` is for the cache.

    Raises ArtifactError if something in a specialisation cannot be written, or the file cannot.
    """
    try:
        with written_whole(path) as file:
            _write(file, target, specializations, key)
    except OSError as error:
        why = error.strerror or str(error)
        raise ArtifactError("The file cannot be written", where=str(path), why=why, fix="give another path") from error


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of the one at `path` once all is written to it, and not before."""
    own = path.with_name(f"{unfinished_prefix(path)}{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with own.open("xb") as file:
            yield file
        own.replace(path)
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def unfinished_prefix(path: Path) -> str:
    """How names begin of files that become the file at `path` when they are whole; they end in `UNFINISHED`."""
    return f".{path.name}."


def load(path: Path, key: str | None = None) -> tuple[Target, list[Specialization]]:
    """The target and the specialisations in the file at `path`, which must have that key, if one is given.

    Raises ArtifactError if the file is damaged, foreign or not for this host.
    """
    manifest, entries = _opened(path, key, runs_here=True)
    # All that can be wrong with the file has been found before the first library is loaded.
    loaded = [Executable.load(entry.program, library, constants) for entry, library, constants in entries]
    descriptions = (entry.description for entry, _, _ in entries)
    return manifest.target, list(map(Specialization, descriptions, loaded))


def verify(path: Path, key: str | None = None) -> None:
    """Nothing, if all is well with the file at `path`, whether or not this host can run it; loads no library.

    Raises ArtifactError if it is damaged or foreign.
    """
    _opened(path, key, runs_here=False)


def _opened(
    path: Path, key: str | None, *, runs_here: bool
) -> tuple[Manifest, list[tuple[Entry, bytes, torch.Tensor]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path, key, runs_here=runs_here)
    except SepcError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except (*MALFORMED, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error


def _write(file: IO[bytes], target: Target, specializations: Iterable[Specialization], key: str) -> None:
    members: dict[str, bytes | memoryview] = {}
    count = 0
    for number, one in enumerate(specializations):
        encoder, executable = Encoder(), one.executable
        text = json.dumps(encoder.encode(Entry(one.description, executable.program)), ensure_ascii=False)
        constants = executable.constants[: executable.program.constants_bytes].numpy().data
        contents = (text.encode(), executable.library, constants, bytes(encoder.tensors))
        members.update(zip(_names(number), contents, strict=True))
        count += 1
    heading_fields = heading_of(FORMAT, FORMAT_VERSION, target, members.items())
    manifest = Manifest(**heading_fields, specializations=count, key=key)
    heading = json.dumps(Encoder().encode(manifest), indent=1, ensure_ascii=False)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {MANIFEST: heading.encode(), **members}.items():
            # With the earliest time that the format knows: equal contents make equal files.
            archive.writestr(zipfile.ZipInfo(name), content)


def _names(number: int) -> tuple[str, str, str, str]:
    """The members of specialisation `number`: its `Entry`, its library, its constants, tensors of calls of PyTorch."""
    return f"{number}/entry.json", f"{number}/library.so", f"{number}/constants.bin", f"{number}/tensors.bin"


def _read(
    archive: zipfile.ZipFile, path: Path, key: str | None, *, runs_here: bool
) -> tuple[Manifest, list[tuple[Entry, bytes, torch.Tensor]]]:
    """The manifest, and per specialisation its entry, library and constants. Raises `MALFORMED` and ArtifactError."""
    infos = {info.filename: info for info in archive.infolist()}
    if MANIFEST not in infos or len(infos) != len(archive.infolist()):
        raise ValueError("it is a zip archive of something else")
    _require_stored(infos[MANIFEST])
    manifest = _manifest(archive.read(infos[MANIFEST]), path)
    count = manifest.specializations
    expected = {name for number in range(min(count, len(infos))) for name in _names(number)}
    if count < 1 or infos.keys() != {MANIFEST, *expected} or manifest.members.keys() != expected:
        raise ValueError("its members are not those that its manifest lists")
    if key is not None and manifest.key != key:
        raise ValueError(f"it is of another compilation, {manifest.key or 'and not of the cache'}")
    if runs_here:
        manifest.require_host(path)
    entries = []
    for number in range(count):
        text, library, constants, tensors = (
            _checked(archive, infos[name], manifest.members[name]) for name in _names(number)
        )
        entry: Entry = Decoder(tensors).decode(Entry, json.loads(text))
        require_sound(entry.description, entry.program, len(constants))
        memory = aligned_bytes(len(constants))
        if constants:
            memory.numpy()[:] = np.frombuffer(constants, dtype=np.uint8)
        entries.append((entry, library, memory))
    return manifest, entries


def _manifest(content: bytes, path: Path) -> Manifest:
    found = json.loads(content)
    require_format(found, FORMAT, FORMAT_VERSION, path)
    manifest: Manifest = Decoder().decode(Manifest, found)
    return manifest


def _checked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, expected: Member) -> bytes:
    """A member whose size and checksum are those of the manifest."""
    _require_stored(info)
    if info.file_size != expected.size_bytes:
        raise ValueError(f"{info.filename} has not the size that the manifest tells")
    return expected.require(info.filename, archive.read(info))


def _require_stored(info: zipfile.ZipInfo) -> None:
    """Nothing, if a member takes no more memory than it has bytes in the file; else raises ValueError."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
