"""``sepc cache``: what there is of compiled models, whether all is well with it, and how to be rid of it."""

from __future__ import annotations

import time
from pathlib import Path

from sepc.cache import Cache, Entry, is_turned_off, limit_bytes, models_directory, why_unusable
from sepc.errors import ArtifactError, SepcError


def status() -> int:
    """Print where the cache is, whether it is used, and what is in it."""
    cache = _cache()
    entries = _entries(cache)
    print(f"directory  {cache.directory}")
    print(f"in use     {_use(cache.directory)}")
    print(f"models     {len(entries)}")
    print(f"size       {_megabytes(sum(entry.size_bytes for entry in entries))} of {_megabytes(cache.size_bytes)}")
    if entries:
        print(f"last used  {_moment(entries[0].used_s)}, the first to go {_moment(entries[-1].used_s)}")
    return 0


def verify() -> int:
    """Check every entry and name those that are of no use; returns 1 if there are any."""
    cache = _cache()
    entries, damaged = _entries(cache), 0
    for entry in entries:
        try:
            cache.verify(entry)
        except ArtifactError as error:
            if entry.path.exists():  # Else it has just gone to make room.
                damaged += 1
                print(f"{entry.path}: {error.why}")
    outlook = ": they will be compiled anew when asked for" if damaged else ""
    print(f"{len(entries)} models, {damaged} damaged or of another version{outlook}")
    return int(damaged > 0)


def clear() -> int:
    """Delete everything in the cache."""
    cache = _cache()
    try:
        gone = cache.clear()
    except OSError as error:
        raise _not_readable(cache.directory, error) from error
    print(f"{len(gone)} models deleted, {_megabytes(sum(entry.size_bytes for entry in gone))}")
    return 0


def _cache() -> Cache:
    """The cache, whether or not it is in use."""
    return Cache(models_directory(), limit_bytes())


def _entries(cache: Cache) -> list[Entry]:
    try:
        return cache.entries()
    except OSError as error:
        raise _not_readable(cache.directory, error) from error


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
