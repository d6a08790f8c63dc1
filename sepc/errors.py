"""The exceptions that users of sepc see.

Every message answers four questions, in this order: what went wrong, where (the user's own source line where there is
one), why, and what to do about it.
"""

from __future__ import annotations


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


class VerificationError(SepcError):
    """A pass changed the meaning of the graph, or left it malformed. Always a bug in sepc."""


class BuildError(SepcError):
    """A tool that compilation needs is missing or failed: TVM, the system's C compiler."""


class ArtifactError(SepcError):
    """A saved model cannot be written, or read: damaged, foreign, of another format, or for another processor."""
