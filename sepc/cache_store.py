"""Directories of files that are kept for later, for all processes of a user, each within a size.

``SEPC_CACHE_DIR`` says where they are (by default in the user's place for caches), ``SEPC_CACHE_SIZE`` how many bytes
each may take (by default 2 GiB), ``SEPC_CACHE=0`` turns them off. Readers take no lock: an entry appears whole, and one
that is deleted while it is read stays readable. Nothing that goes wrong here fails a compilation: it is logged.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self

from sepc.cost_model.calibration import cache_directory
from sepc.errors import ArtifactError
from sepc.runtime import artifact

DEFAULT_SIZE_BYTES: Final = 2 << 30
LOCK: Final = ".lock"
_SUFFIX: Final = ".sepc"
_DIGEST_BYTES: Final = 32
# What a process that was killed has left of a file: nobody takes so long to write one.
_STALE_S: Final = 3600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A file of a store.

    Attributes:
        path: where it is. key: what it is asked for by.
        size_bytes: how large it is. used_s: when it was last written or read, in seconds since 1970.
    """

    path: Path
    key: str
    size_bytes: int
    used_s: float


@dataclass(frozen=True)
class Store(ABC):
    """A directory of files, each named by its key. The least recently used go when it outgrows `size_bytes`."""

    directory: Path
    size_bytes: int = DEFAULT_SIZE_BYTES

    name: ClassVar[str]
    """Of the directory, and of what is in it."""

    @classmethod
    def of_user(cls) -> Self:
        """The user's, as the environment describes it, whether or not it can be used."""
        return cls(cache_directory() / cls.name, limit_bytes())

    @classmethod
    def open(cls) -> Self | None:
        """The user's; None where it is turned off or cannot be used."""
        if is_turned_off():
            return None
        own = cls.of_user()
        try:
            for one in (own.directory.parent, own.directory):
                one.mkdir(mode=0o700, parents=True, exist_ok=True)
            why = why_unusable(own.directory)
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            logger.warning("no cache of %s in %s: %s; SEPC_CACHE_DIR gives another place", cls.name, own.directory, why)
            return None
        return own

    @abstractmethod
    def verify(self, entry: Entry) -> None:
        """Nothing, if all is well with `entry`; raises ArtifactError if it is damaged or of something else."""

    def entries(self) -> list[Entry]:
        """What there is, the most recently used first; nothing where there is no directory. Raises OSError."""
        return sorted(self._entries(), key=lambda entry: -entry.used_s)

    def clear(self) -> list[Entry]:
        """Delete everything, and return what there was; what others are writing now is theirs. Raises OSError."""
        found = self.entries()
        for entry in found:
            entry.path.unlink(missing_ok=True)
        self._delete_stale()
        return found

    def path(self, key: str) -> Path:
        """Where the entry of that key is, or would be."""
        return self.directory / f"{key}{_SUFFIX}"

    def _entries(self) -> Iterator[Entry]:
        for path in self._files():
            with suppress(FileNotFoundError):  # Another process is at it, too.
                if path.suffix == _SUFFIX:
                    status = path.stat()
                    yield Entry(path, path.stem, status.st_size, status.st_mtime)

    def _files(self) -> list[Path]:
        try:
            return list(self.directory.iterdir())
        except FileNotFoundError:
            return []

    def shrink(self) -> None:
        """Delete the least recently used entries beyond the size, and what killed processes have left."""
        self._delete_stale()
        total = 0
        for entry in self.entries():
            total += entry.size_bytes
            if total > self.size_bytes:
                logger.info("deleting %s from the cache, which is full", entry.path)
                delete(entry.path)

    def _delete_stale(self) -> None:
        """Delete what killed processes have left."""
        now = time.time()

        def is_stale(name: str) -> bool:
            is_ours = name.endswith((artifact.UNFINISHED, LOCK))
            return is_ours and now - (self.directory / name).stat().st_mtime > _STALE_S

        self.delete_if(is_stale)

    def delete_if(self, is_to_go: Callable[[str], bool]) -> None:
        """Delete the files with names that are to go."""
        for path in self._files():
            with suppress(FileNotFoundError):
                if is_to_go(path.name):
                    delete(path)


class Blobs(Store):
    """Bytes, each with a checksum in front: machine code for GPUs."""

    name = "cubins"

    def read(self, key: str) -> bytes | None:
        """What `write` has kept under that key; None if there is nothing, or it is damaged."""
        path = self.path(key)
        try:
            content = _checked(path)
            os.utime(path)
        except ArtifactError as error:
            logger.warning("%s is of no use, and made anew: %s", path, one_line(error))
            return None
        except OSError:
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Keep bytes under a key, and delete what has not been used for longest if there is no room."""
        try:
            with artifact.written_whole(self.path(key)) as file:
                file.write(_digest(content) + content)
            self.shrink()
        except OSError as error:
            logger.warning("not kept in the cache: %s", one_line(error))

    def verify(self, entry: Entry) -> None:
        """Nothing, if all is well with `entry`; raises ArtifactError if it is damaged."""
        _checked(entry.path)


def is_turned_off() -> bool:
    """Whether the user wants no cache."""
    return os.environ.get("SEPC_CACHE", "1") == "0"


def why_unusable(directory: Path) -> str:
    """Why others could put kernels into `directory`, or nobody can; empty if all is well. Raises OSError."""
    place = directory.resolve(strict=True)
    if hasattr(os, "geteuid") and place.stat().st_uid != os.geteuid():
        return "it belongs to another user"
    for one in (place, *place.parents):  # Who may rename a directory may put another in its place.
        status = one.stat()
        which = "it" if one == place else str(one)
        if hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid()):
            return f"{which} belongs to another user"
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others and (one == place or not status.st_mode & stat.S_ISVTX):
            return f"other users may write to {which}"
    return "" if os.access(place, os.W_OK | os.X_OK) else "it cannot be written to"


def limit_bytes() -> int:
    """How many bytes the cache may take."""
    text = os.environ.get("SEPC_CACHE_SIZE", "")
    if text and not text.isdecimal():
        logger.warning("SEPC_CACHE_SIZE=%s is no number of bytes; it is taken as %d", text, DEFAULT_SIZE_BYTES)
    return int(text) if text.isdecimal() else DEFAULT_SIZE_BYTES


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _checked(path: Path) -> bytes:
    """The bytes in a file behind their checksum; raises ArtifactError if that is another's, and OSError."""
    kept = path.read_bytes()
    digest, content = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
    if digest != _digest(content):
        raise ArtifactError("The file is damaged", where=str(path), why="its checksum is wrong")
    return content


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


def delete(path: Path) -> None:
    """Delete a file, if it is there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot delete %s: %s", path, error)
