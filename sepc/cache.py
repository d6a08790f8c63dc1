"""A cache of compiled models on disk: artefacts of one specialisation each, in a store (`sepc.cache_store`).

Who builds an entry holds a lock of its key, so that others who want the same wait for it. The system gives the lock
back when its holder dies.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

import filelock

from sepc.cache_key import SOURCES_DIGEST, read_sources_digest
from sepc.cache_store import LOCK, Entry, Store, delete, one_line
from sepc.errors import ArtifactError
from sepc.runtime import artifact
from sepc.runtime.specialization import Specialization
from sepc.target import Target

LONGEST_WAIT_S: Final = 600.0
"""How long to wait for a process that builds the same; a holder that is stopped for longer costs a second build."""

logger = logging.getLogger(__name__)
Made = TypeVar("Made", bound=Specialization)


class Cache(Store):
    """Compiled models."""

    name = "models"

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
                logger.warning("%s is of no use, and made anew: %s", self.path(key), one_line(found))
            made = make()
            if keep(made):
                self._write(key, target, made)
            return made

    def _read(self, key: str) -> Specialization | ArtifactError | None:
        """The specialisation of that key; None if there is none, or what is wrong with it."""
        path = self.path(key)
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
        path = self.path(key)
        try:
            artifact.save(path, target, [specialization], key)
            logger.info("kernels kept in the cache: %s", path)
            self.shrink()
        except (ArtifactError, OSError) as error:
            logger.warning("not kept in the cache: %s", one_line(error))

    def verify(self, entry: Entry) -> None:
        """Nothing, if all is well with `entry`; raises ArtifactError if it is damaged or of something else."""
        artifact.verify(entry.path, entry.key)

    @contextmanager
    def _making(self, key: str) -> Iterator[None]:
        """Be the only one who makes the entry of `key`."""
        path = self.directory / f"{key}{LOCK}"
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
            logger.info("compiling without a lock: %s", one_line(error))
        try:
            if lock.is_locked:  # Whoever had begun with this entry is dead.
                prefix = artifact.unfinished_prefix(self.path(key))
                self.delete_if(lambda name: name.startswith(prefix) and name.endswith(artifact.UNFINISHED))
            yield
        finally:
            if lock.is_locked:
                delete(path)  # Those who wait for it will see that, and make one of their own.
                lock.release()
