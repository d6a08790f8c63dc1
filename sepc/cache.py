"""A cache of compiled models on disk, shared by all processes of a user: artefacts of one specialisation each.

``SEPC_CACHE_DIR`` says where it is (by default in the user's place for caches), ``SEPC_CACHE_SIZE`` how many bytes it
may take (by default 2 GiB), ``SEPC_CACHE=0`` turns it off. Nothing that goes wrong here fails a compilation: it is
logged, and the model is compiled.

Readers take no lock: an entry appears whole, and one that is deleted while it is read stays readable. Who builds an
entry holds a lock of that key, so that others who want the same wait for it. The system gives the lock back when its
holder dies.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import filelock

from sepc.cache_key import SOURCES_DIGEST, read_sources_digest
from sepc.cost_model.calibration import cache_directory
from sepc.errors import ArtifactError
from sepc.runtime import artifact
from sepc.runtime.specialization import Specialization
from sepc.target import Target

DEFAULT_SIZE_BYTES: Final = 2 << 30
LONGEST_WAIT_S: Final = 600.0
"""How long to wait for a process that builds the same; a holder that is stopped for longer costs a second build."""
_SUFFIX: Final = ".sepc"
_LOCK: Final = ".lock"
_DIGEST_BYTES: Final = 32
# What a process that was killed has left of a file: nobody takes so long to write one.
_STALE_S: Final = 3600.0

logger = logging.getLogger(__name__)
Made = TypeVar("Made", bound=Specialization)


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        path: where it is. key: of the compilation that it holds.
        size_bytes: how large it is. used_s: when it was last written or read, in seconds since 1970.
    """

    path: Path
    key: str
    size_bytes: int
    used_s: float


@dataclass(frozen=True)
class Cache:
    """A directory of artefacts, each named by its key. The least recently used go when it outgrows `size_bytes`."""

    directory: Path
    size_bytes: int = DEFAULT_SIZE_BYTES

    @staticmethod
    def open() -> Cache | None:
        """The user's cache as the environment describes it; None where it is turned off or cannot be used."""
        return Cache.open_directory(models_directory())

    @staticmethod
    def open_directory(directory: Path) -> Cache | None:
        """The user's cache in that directory, in the same way."""
        if is_turned_off():
            return None
        try:
            for one in (directory.parent, directory):
                one.mkdir(mode=0o700, parents=True, exist_ok=True)
            why = why_unusable(directory)
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            logger.warning("no cache in %s: %s; SEPC_CACHE_DIR gives another place", directory, why)
            return None
        return Cache(directory, limit_bytes())

    def get_or_make(
        self, key: str | None, target: Target, make: Callable[[], Made], keep: Callable[[Made], bool]
    ) -> Specialization | Made:
        """The specialisation of that key; where there is none, what `make` returns, which is kept if `keep` says so.

        Of all threads and processes that ask for one key at a time, one makes it, and the others wait for that.
        """
        if key is None:
            logger.info("not kept in the cache: there is no text that tells all of the model's graph")
            return make()
        found = self._read(key)
        if isinstance(found, Specialization):
            return found
        with self._making(key):
            found = self._read(key)  # Somebody else may have made it just now.
            if isinstance(found, Specialization):
                return found
            if found is not None:
                logger.warning("%s is of no use, and made anew: %s", self._path(key), _line(found))
            made = make()
            if keep(made):
                self._write(key, target, made)
            return made

    def _read(self, key: str) -> Specialization | ArtifactError | None:
        """The specialisation of that key; None if there is none, or what is wrong with it."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            _, (found, *_) = artifact.load(path, key)
        except ArtifactError as error:
            return error
        with suppress(OSError):  # It is deleted by now, perhaps.
            os.utime(path)  # Now it is the one most recently used.
        logger.info("kernels from the cache: %s", path)
        return found

    def _write(self, key: str, target: Target, specialization: Specialization) -> None:
        """Keep a specialisation under its key, and delete what has not been used for longest if there is no room."""
        if read_sources_digest() != SOURCES_DIGEST:
            logger.info("not kept in the cache: sepc has been edited since this process began")
            return
        path = self._path(key)
        try:
            artifact.save(path, target, [specialization], key)
            logger.info("kernels kept in the cache: %s", path)
            self._shrink()
        except (ArtifactError, OSError) as error:
            logger.warning("not kept in the cache: %s", _line(error))

    def entries(self) -> list[Entry]:
        """What there is, the most recently used first; nothing where there is no directory. Raises OSError."""
        return sorted(self._entries(), key=lambda entry: -entry.used_s)

    def verify(self, entry: Entry) -> None:
        """Nothing, if all is well with `entry`; raises ArtifactError if it is damaged or of something else."""
        artifact.verify(entry.path, entry.key)

    def clear(self) -> list[Entry]:
        """Delete everything, and return what there was; what others are writing now is theirs. Raises OSError."""
        found = self.entries()
        for entry in found:
            entry.path.unlink(missing_ok=True)
        self._delete_stale()
        return found

    @contextmanager
    def _making(self, key: str) -> Iterator[None]:
        """Be the only one who makes the entry of `key`."""
        path = self.directory / f"{key}{_LOCK}"
        lock = filelock.FileLock(path, mode=0o600)
        try:
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                logger.info("another process compiles this model; waiting for it")
                lock.acquire(timeout=LONGEST_WAIT_S)
        except filelock.Timeout:
            logger.warning("compiling, as the process that compiles this model takes more than %.0f s", LONGEST_WAIT_S)
        except (OSError, NotImplementedError) as error:  # A file system without locks, or without space.
            logger.info("compiling without a lock: %s", _line(error))
        try:
            if lock.is_locked:  # Whoever had begun with this entry is dead.
                prefix = artifact.unfinished_prefix(self._path(key))
                self._delete_if(lambda name: name.startswith(prefix) and name.endswith(artifact.UNFINISHED))
            yield
        finally:
            if lock.is_locked:
                _delete(path)  # Those who wait for it will see that, and make one of their own.
                lock.release()

    def read(self, key: str) -> bytes | None:
        """What `write` has kept under that key; None if there is nothing, or it is damaged."""
        path = self._path(key)
        try:
            kept = path.read_bytes()
            digest, content = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
            if digest != _digest(content):
                logger.warning("%s is damaged, and made anew", path)
                return None
            os.utime(path)
        except OSError:
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Keep bytes under a key, and delete what has not been used for longest if there is no room."""
        try:
            with artifact.written_whole(self._path(key)) as file:
                file.write(_digest(content) + content)
            self._shrink()
        except OSError as error:
            logger.warning("not kept in the cache: %s", _line(error))

    def _path(self, key: str) -> Path:
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

    def _shrink(self) -> None:
        """Delete the least recently used entries beyond the size, and what killed processes have left."""
        self._delete_stale()
        total = 0
        for entry in self.entries():
            total += entry.size_bytes
            if total > self.size_bytes:
                logger.info("deleting %s from the cache, which is full", entry.path)
                _delete(entry.path)

    def _delete_stale(self) -> None:
        """Delete what killed processes have left."""
        now = time.time()

        def is_stale(name: str) -> bool:
            is_ours = name.endswith((artifact.UNFINISHED, _LOCK))
            return is_ours and now - (self.directory / name).stat().st_mtime > _STALE_S

        self._delete_if(is_stale)

    def _delete_if(self, is_to_go: Callable[[str], bool]) -> None:
        """Delete the files with names that are to go."""
        for path in self._files():
            with suppress(FileNotFoundError):
                if is_to_go(path.name):
                    _delete(path)


def is_turned_off() -> bool:
    """Whether the user wants no cache."""
    return os.environ.get("SEPC_CACHE", "1") == "0"


def models_directory() -> Path:
    """Where compiled models are."""
    return cache_directory() / "models"


def cubins_directory() -> Path:
    """Where machine code of GPUs is."""
    return cache_directory() / "cubins"


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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot delete %s: %s", path, error)
