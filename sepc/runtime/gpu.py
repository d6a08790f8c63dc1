"""What GPUs of all kinds run: kernels by symbol, each launched in so many blocks of so many threads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        blocks, threads: how many blocks, and threads of each. shared_bytes: shared memory beyond what it declares.
        element_bytes: the size of what each of its pointers points to.
    """

    blocks: int
    threads: int
    shared_bytes: int
    element_bytes: tuple[int, ...]
