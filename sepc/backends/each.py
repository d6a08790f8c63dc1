"""Kernels made one by one: what cannot be made is told together, so that PyTorch can take its place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sepc.errors import KernelError, SepcError, TargetError
from sepc.progress import progress

Made = TypeVar("Made")


def of_each(symbols: Collection[str], make: Callable[[str], Made], workers: int = 1) -> dict[str, Made]:
    """What `make` makes of each kernel, by symbol, `workers` at a time.

    Raises KernelError with the reasons of all that it fails at. What is about no single kernel, an OSError or a
    TargetError, is raised as it is.
    """
    reasons: dict[str, str] = {}
    made: dict[str, Made] = {}

    def make_one(symbol: str) -> None:
        try:
            made[symbol] = make(symbol)
        except (OSError, TargetError):
            raise
        except Exception as error:  # TVM raises whatever its passes stumble over.
            reasons[symbol] = reason_of(error)

    with ThreadPoolExecutor(workers) as pool:
        for _ in progress(pool.map(make_one, symbols), "kernels", len(symbols)):
            pass
    if reasons:
        raise KernelError(f"{len(reasons)} of {len(symbols)} kernels could not be compiled", reasons)
    return {symbol: made[symbol] for symbol in symbols}


def reason_of(error: Exception) -> str:
    """Why something failed: of an error of ours what it says of that, of others the last line."""
    if isinstance(error, SepcError):
        return error.why or error.what
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
