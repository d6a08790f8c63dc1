"""``sepc cache``: what is kept of compiled models, whether all is well with it, and how to be rid of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sepc.cache import Cache
from sepc.cache_store import Blobs, Entry, Store, is_turned_off, why_unusable
from sepc.errors import ArtifactError, SepcError

STORES: Final[tuple[type[Store], ...]] = (Cache, Blobs)


def status() -> int:
    """Print where the cache is, whether it is used, and what is in it."""
    for store, entries in _stores():
        size_bytes = sum(entry.size_bytes for entry in entries)
        print(f"directory  {store.directory}")
        print(f"in use     {_use(store.directory)}")
        print(f"{store.name:10} {len(entries)}")
        print(f"size       {_megabytes(size_bytes)} of {_megabytes(store.size_bytes)}")
        if entries:
            print(f"last used  {_moment(entries[0].used_s)}, the first to go {_moment(entries[-1].used_s)}")
    return 0


def verify() -> int:
    """Check every entry and name those that are of no use; returns 1 if there are any."""
    return max([_verify(store, entries) for store, entries in _stores()])


def _verify(store: Store, entries: list[Entry]) -> int:
    damaged = 0
    for entry in entries:
        try:
            store.verify(entry)
        except (ArtifactError, FileNotFoundError) as error:
            if entry.path.exists():  # Else it has just gone to make room.
                damaged += 1
                print(f"{entry.path}: {getattr(error, 'why', error)}")
    outlook = ": they will be compiled anew when asked for" if damaged else ""
    print(f"{len(entries)} {store.name}, {damaged} damaged or of another version{outlook}")
    return int(damaged > 0)


def clear() -> int:
    """Delete everything in the cache."""
    for store, _ in _stores():
        try:
            gone = store.clear()
        except OSError as error:
            raise _not_readable(store.directory, error) from error
        print(f"{len(gone)} {store.name} deleted, {_megabytes(sum(entry.size_bytes for entry in gone))}")
    return 0


def _stores() -> Iterator[tuple[Store, list[Entry]]]:
    """What is kept, whether or not it is in use; raises SepcError where that cannot be read.

    Models first, and of what else there may be that which there is.
    """
    for kind in STORES:
        store = kind.of_user()
        try:
            if kind is Cache or store.directory.exists():
                yield store, store.entries()
        except OSError as error:
            raise _not_readable(store.directory, error) from error


def _not_readable(directory: Path, error: OSError) -> SepcError:
    why = error.strerror or str(error)
    return SepcError("The cache cannot be read, or changed", where=str(directory), why=why, fix="set SEPC_CACHE_DIR")


def _use(directory: Path) -> str:
    if is_turned_off():
        return "no: SEPC_CACHE is 0"
    try:
        why = why_unusable(directory)
    except FileNotFoundError:
        return "yes, from the first compilation on"
    except OSError as error:
        why = error.strerror or str(error)
    return f"no: {why}" if why else "yes"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
