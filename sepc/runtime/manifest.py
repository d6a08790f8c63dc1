"""What every file or directory of compiled code begins with, and what is checked before any of it runs.

Of PyTorch nothing is needed here: exported models are loaded without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from sepc import __version__ as sepc_version
from sepc.cost_model.detect import HostCpu, host_cpu
from sepc.errors import ArtifactError
from sepc.target import Target

MANIFEST: Final = "manifest.json"
# What zipfile, json and the decoder raise for files that somebody has changed.
MALFORMED: Final = (
    *(ValueError, TypeError, LookupError, AttributeError),
    *(AssertionError, EOFError, RuntimeError, OverflowError),
)


@dataclass(frozen=True)
class Member:
    """A file beside the manifest, as that tells of it: blake2b with 32 bytes, in hexadecimal digits."""

    size_bytes: int
    blake2b: str

    @staticmethod
    def of(content: bytes | bytearray | memoryview) -> Member:
        """What the manifest tells of a file with this content."""
        return Member(len(content), digest(content))

    def require(self, name: str, content: bytes) -> bytes:
        """`content`, which must be what this tells; raises ValueError."""
        if len(content) != self.size_bytes:
            raise ValueError(f"{name} has not the size that the manifest tells")
        if digest(content) != self.blake2b:
            raise ValueError(f"the checksum of {name} is wrong")
        return content


@dataclass(frozen=True)
class Heading:
    """What a manifest begins with.

    Attributes:
        format, format_version: what sort of file this is.
        versions: of sepc, torch and TVM, with which it was made.
        target: what it was compiled for. cpu_features: LLVM's names of what its kernels may use.
        members: all other files.
    """

    format: str
    format_version: int
    versions: dict[str, str]
    target: Target
    cpu_features: tuple[str, ...]
    members: dict[str, Member]

    def require_host(self, path: Path) -> None:
        """Nothing, if this host can run the kernels; raises ArtifactError otherwise."""
        target, host = self.target, host_cpu()
        try:
            more = tuple(set(self.cpu_features) - set(required_features(target)))
            missing = tuple(dict.fromkeys((*target.missing_features(host), *sorted(host.lacks(more)))))
        except KeyError as error:
            raise ValueError(f"it is compiled for a core that this sepc does not know, {target.llvm_cpu!r}") from error
        if missing:
            fix = f"compile for this host's architecture, {host.architecture}, and save that"
            if host.architecture == target.machine.architecture:
                fix = "compile for a target that all hosts have, such as 'x86-64-v3', and save that"
            raise ArtifactError(
                f"This host cannot run kernels for {target.llvm_cpu} (target '{target.name}')",
                where=str(path),
                why=f"it lacks {', '.join(missing)}",
                fix=fix,
            )


def heading_of(
    name: str, version: int, target: Target, members: Iterable[tuple[str, bytes | memoryview]]
) -> dict[str, Any]:
    """The fields of a `Heading` for `target`, with these files beside it."""
    return {
        "format": name,
        "format_version": version,
        "versions": versions(),
        "target": target,
        "cpu_features": required_features(target),
        "members": {name: Member.of(content) for name, content in members},
    }


def require_format(found: Any, name: str, version: int, path: Path) -> None:
    """Nothing, if `found` is the JSON of a manifest of this format; raises ValueError or ArtifactError otherwise."""
    if not isinstance(found, dict) or found.get("format") != name:
        raise ValueError("it is of something else")
    if found.get("format_version") != version:
        raise ArtifactError(
            "The file has another format",
            where=str(path),
            why=f"it is of version {found.get('format_version')}, sepc {sepc_version} reads {version}",
            fix="load it with the version of sepc that saved it, or compile and save the model anew",
        )


def unreadable(path: Path, error: OSError) -> ArtifactError:
    """The error for a file that the system does not let us read."""
    why = error.strerror or str(error)
    return ArtifactError("The file cannot be read", where=str(path), why=why, fix="check the path")


def damaged(path: Path, error: Exception) -> ArtifactError:
    """The error for a file that makes no sense."""
    why = str(error) or type(error).__name__
    fix = "copy it again from where it was saved, or compile and save the model anew"
    return ArtifactError("The file is no artefact of sepc, or damaged", where=str(path), why=why, fix=fix)


def versions() -> dict[str, str]:
    """The versions that an artefact is made with, without importing what they are of."""
    found = {"sepc": sepc_version}
    for name in ("torch", "apache-tvm", "apache-tvm-ffi"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def digest(content: bytes | bytearray | memoryview) -> str:
    """The checksum of a member."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def required_features(target: Target) -> tuple[str, ...]:
    """LLVM's names of the features that code for `target` may use: all that a host with none of them lacks."""
    return target.missing_features(HostCpu(target.machine.architecture, "", flags=frozenset(), machine_name=""))
