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


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one architecture, as its assembler tells.

    Attributes:
        registers: of a thread. spilled_bytes: stores and loads of registers that did not fit.
        shared_bytes: shared memory of a block, all of it. occupancy: resident warps out of those that there could be.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float

    def __str__(self) -> str:
        spilled = f"{self.spilled_bytes} bytes spilled" if self.spilled_bytes else "none spilled"
        shared = f"{self.shared_bytes / 1024:.1f} KiB shared"
        return f"{self.registers} registers, {spilled}, {shared}, occupancy {self.occupancy:.0%}"
