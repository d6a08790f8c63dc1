"""A cache of compiled models on disk, shared by all processes of a user: artefacts of one specialisation each.

``SEPC_CACHE_DIR`` says where it is (by default in the user's place for caches), ``SEPC_CACHE_SIZE`` how many bytes it
may take (by default 2 GiB), ``SEPC_CACHE=0`` turns it off. Nothing that goes wrong here fails a compilation: it is
logged, and the model is compiled.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sepc.cache_key import SOURCES_DIGEST, read_sources_digest
from sepc.cost_model.calibration import cache_directory
from sepc.errors import ArtifactError
from sepc.runtime import artifact
from sepc.runtime.specialization import Specialization
from sepc.target import Target

DEFAULT_SIZE_BYTES: Final = 2 << 30
_SUFFIX: Final = ".sepc"
# What a process that was killed has left of a file: nobody takes so long to write one.
_STALE_S: Final = 3600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """A directory of artefacts, each named by its key. The least recently used go when it outgrows `size_bytes`."""

    directory: Path
    size_bytes: int = DEFAULT_SIZE_BYTES

    @staticmethod
    def open() -> Cache | None:
        """The user's cache as the environment describes it; None where it is turned off or cannot be used."""
        if os.environ.get("SEPC_CACHE", "1") == "0":
            return None
        directory = cache_directory() / "models"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            why = _unsafe(directory)
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            logger.warning("no cache of compiled models in %s: %s; SEPC_CACHE_DIR gives another place", directory, why)
            return None
        return Cache(directory, _size_bytes())

    def get(self, key: str | None) -> Specialization | None:
        """The specialisation of that key, or None. One that is damaged is deleted."""
        if key is None:
            return None
        path = self._path(key)
        if not path.exists():
            return None
        try:
            _, (found,) = artifact.load(path)
            os.utime(path)  # Now it is the one most recently used.
        except (ArtifactError, OSError, ValueError) as error:
            logger.warning("deleting %s from the cache: %s", path, _line(error))
            _delete(path)
            return None
        logger.info("kernels from the cache: %s", path)
        return found

    def put(self, key: str | None, target: Target, specialization: Specialization) -> None:
        """Keep a specialisation under its key, and delete what has not been used for longest if there is no room."""
        if key is None:
            logger.info("not kept in the cache: there is no text that tells all of the model's graph")
            return
        if read_sources_digest() != SOURCES_DIGEST:
            logger.info("not kept in the cache: sepc has been edited since this process began")
            return
        path = self._path(key)
        try:
            artifact.save(path, target, [specialization])
            logger.info("kernels kept in the cache: %s", path)
            self._shrink()
        except (ArtifactError, OSError) as error:
            logger.warning("not kept in the cache: %s", _line(error))

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}{_SUFFIX}"

    def _shrink(self) -> None:
        """Delete the least recently used entries beyond the size, and what killed processes have left."""
        now, entries = time.time(), []
        for path in self.directory.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # Another process is at it, too.
                continue
            if path.suffix == _SUFFIX:
                entries.append((status.st_mtime_ns, status.st_size, path))
            elif path.suffix == ".tmp" and now - status.st_mtime > _STALE_S:
                _delete(path)
        total = 0
        for _, size, path in sorted(entries, reverse=True):
            total += size
            if total > self.size_bytes:
                logger.info("deleting %s from the cache, which is full", path)
                _delete(path)


def _unsafe(directory: Path) -> str:
    """Why others could put kernels there, or nobody can; empty if all is well."""
    status = directory.stat()
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        return "it belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users may write to it"
    return "" if os.access(directory, os.W_OK | os.X_OK) else "it cannot be written to"


def _size_bytes() -> int:
    text = os.environ.get("SEPC_CACHE_SIZE", "")
    if text and not text.isdecimal():
        logger.warning("SEPC_CACHE_SIZE=%s is no number of bytes; it is taken as %d", text, DEFAULT_SIZE_BYTES)
    return int(text) if text.isdecimal() else DEFAULT_SIZE_BYTES


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot delete %s: %s", path, error)
