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
FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class Manifest(Heading):
    """What a file begins with; `specializations` is how many there are."""

    specializations: int


@dataclass(frozen=True)
class Entry:
    """What a specialisation's JSON holds."""

    description: Description
    program: Program


def save(path: Path, target: Target, specializations: Iterable[Specialization]) -> None:
    """Write an artefact to `path`, whole or not at all.

    Raises ArtifactError if something in a specialisation cannot be written, or the file cannot.
    """
    try:
        with written_whole(path) as file:
            _write(file, target, specializations)
    except OSError as error:
        why = error.strerror or str(error)
        raise ArtifactError("The file cannot be written", where=str(path), why=why, fix="give another path") from error


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of the one at `path` once all is written to it, and not before."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with own.open("xb") as file:
            yield file
        own.replace(path)
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def load(path: Path) -> tuple[Target, list[Specialization]]:
    """The target and the specialisations in the file at `path`.

    Raises ArtifactError if the file is damaged, foreign or not for this host.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            manifest, entries = _read(archive, path)
    except SepcError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except (*MALFORMED, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    # All that can be wrong with the file has been found before the first library is loaded.
    loaded = [Executable.load(entry.program, library, constants) for entry, library, constants in entries]
    descriptions = (entry.description for entry, _, _ in entries)
    return manifest.target, list(map(Specialization, descriptions, loaded))


def _write(file: IO[bytes], target: Target, specializations: Iterable[Specialization]) -> None:
    members: dict[str, bytes | memoryview] = {}
    count = 0
    for number, one in enumerate(specializations):
        encoder, executable = Encoder(), one.executable
        text = json.dumps(encoder.encode(Entry(one.description, executable.program)), ensure_ascii=False)
        constants = executable.constants[: executable.program.constants_bytes].numpy().data
        contents = (text.encode(), executable.library, constants, bytes(encoder.tensors))
        members.update(zip(_names(number), contents, strict=True))
        count += 1
    manifest = Manifest(**heading_of(FORMAT, FORMAT_VERSION, target, members.items()), specializations=count)
    heading = json.dumps(Encoder().encode(manifest), indent=1, ensure_ascii=False)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {MANIFEST: heading.encode(), **members}.items():
            # With the earliest time that the format knows: equal contents make equal files.
            archive.writestr(zipfile.ZipInfo(name), content)


def _names(number: int) -> tuple[str, str, str, str]:
    """The members of specialisation `number`: its `Entry`, its library, its constants, tensors of calls of PyTorch."""
    return f"{number}/entry.json", f"{number}/library.so", f"{number}/constants.bin", f"{number}/tensors.bin"


def _read(archive: zipfile.ZipFile, path: Path) -> tuple[Manifest, list[tuple[Entry, bytes, torch.Tensor]]]:
    """The manifest, and per specialisation its entry, library and constants. Raises `MALFORMED` and ArtifactError."""
    infos = {info.filename: info for info in archive.infolist()}
    if MANIFEST not in infos or len(infos) != len(archive.infolist()):
        raise ValueError("it is a zip archive of something else")
    manifest = _manifest(archive.read(infos[MANIFEST]), path)
    count = manifest.specializations
    expected = {name for number in range(min(count, len(infos))) for name in _names(number)}
    if count < 1 or infos.keys() != {MANIFEST, *expected} or manifest.members.keys() != expected:
        raise ValueError("its members are not those that its manifest lists")
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
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != expected.size_bytes:
        raise ValueError(f"{info.filename} has not the size that the manifest tells")
    return expected.require(info.filename, archive.read(info))
