"""The exceptions that users of sepc see.

Every message answers four questions, in this order: what went wrong, where (the user's own source line where there is
one), why, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class SepcError(Exception):
    """Base class of all errors raised on purpose by sepc.

    Args:
        what: one sentence: what went wrong.
        where: the user's source line (``file:line``), an argument name or a node name.
        why: the reason, as precise as it is known.
        fix: what the user can do.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        parts = [what.rstrip(".") + "."]
        for label, text in (("Where", where), ("Why", why), ("What to do", fix)):
            if text:
                parts.append(f"{label}: {text}")
        super().__init__("\n  ".join(parts))


class ModelError(SepcError):
    """The model cannot be compiled as it is: training mode, not exportable, unsupported device or dtype."""


class InputError(SepcError):
    """An input to a compiled model does not fit: rank, dtype, device, structure, or too many shapes."""


class TargetError(SepcError):
    """The target name is unknown, or this machine cannot run or build for it."""


class DeviceError(SepcError):
    """A remote device cannot be reached, was lost in the middle of a call, or failed at it."""


class PassError(SepcError):
    """A pass failed. Always a bug in it: in sepc, or in the package that it is from."""


class VerificationError(PassError):
    """A pass changed the meaning of the graph, or left it malformed."""


class BuildError(SepcError):
    """A tool that compilation needs is missing or failed: TVM, the system's C compiler."""


class KernelError(BuildError):
    """Some kernels could not be compiled, for the `reasons` by their symbols; PyTorch can take their place."""

    def __init__(self, what: str, reasons: Mapping[str, str]) -> None:
        self.reasons = reasons
        super().__init__(what, where=", ".join(reasons), why="; ".join(dict.fromkeys(reasons.values())))


class OutOfMemoryError(SepcError, MemoryError):
    """The system refuses the memory that a call needs."""


class ArtifactError(SepcError):
    """A saved model cannot be written, or read: damaged, foreign, of another format, or for another processor."""


def did_you_mean(written: str, known: Iterable[str], most: int = 1) -> str:
    """A question that names those of the `known`, at `most` so many, that look like what was written; else empty."""
    near = difflib.get_close_matches(written, list(known), n=most)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def require_known(name: str, known: Iterable[str], what: str, where: str = "") -> None:
    """Nothing, if `name` is one of the `known`; raises InputError, which lists them and suggests."""
    names = sorted(known)
    if name not in names:
        why = f"known are {', '.join(names)}" if names else "there are none"
        raise InputError(f"There is no {what} '{name}'", where=where, why=why, fix=did_you_mean(name, names))
