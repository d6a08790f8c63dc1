"""All cores that sepc builds for, of every architecture, by LLVM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from sepc.cost_model.arm_cpus import ARM_ALIASES, ARM_CPUS, LINUX_FLAG_OF_ARM_FEATURE
from sepc.cost_model.x86_cpus import LINUX_FLAG_OF_FEATURE, X86_CPUS


class Cpu(Protocol):
    """A core as LLVM names it."""

    @property
    def name(self) -> str:
        """LLVM's name (``-mcpu``)."""

    @property
    def architecture(self) -> str:
        """As `Machine.architecture`."""

    @property
    def machine(self) -> str:
        """The machine description that represents it."""

    @property
    def vector_bits(self) -> int:
        """Width of the widest vectors that kernels use."""

    @property
    def features(self) -> tuple[str, ...]:
        """LLVM features that code for this core may use, beyond what every machine of the architecture has."""

    @property
    def target_features(self) -> tuple[str, ...]:
        """What LLVM is told beside the name: '+avx2' to add a feature, '-sve' to leave one out."""

    @property
    def is_modest(self) -> bool:
        """Whether a host whose features cannot be read is taken to have all that the core has."""


@dataclass(frozen=True)
class Family:
    """The cores of one architecture, as targets name them.

    Attributes:
        prefix: what stands before a core's name. generic: names that need no prefix, with the core that each means.
        cpus: the cores by LLVM's names. aliases: other names that users know.
    """

    prefix: str
    generic: Mapping[str, str]
    cpus: Mapping[str, Cpu]
    aliases: Mapping[str, str]

    def find(self, name: str) -> Cpu | None:
        """The core that a target of that name means, if it is of this family."""
        if name in self.generic:
            return self.cpus[self.generic[name]]
        if not name.startswith(self.prefix):
            return None
        core = name.removeprefix(self.prefix)
        return self.cpus.get(self.aliases.get(core, core))

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of a target of this family."""
        cores = [core for core in (*self.cpus, *self.aliases) if core not in self.generic.values()]
        return (*self.generic, *(self.prefix + core for core in cores))


X86: Final = Family("x86:", {"x86-64-v3": "x86-64-v3", "x86-64-v4": "x86-64-v4"}, X86_CPUS, {})
ARM: Final = Family("arm64:", {"arm64": "generic"}, ARM_CPUS, ARM_ALIASES)
FAMILIES: Final = (X86, ARM)
CPUS: Final[Mapping[str, Cpu]] = {**X86_CPUS, **ARM_CPUS}
LINUX_FLAGS: Final[Mapping[str, str]] = {**LINUX_FLAG_OF_FEATURE, **LINUX_FLAG_OF_ARM_FEATURE}
"""Where the flag in Linux' /proc/cpuinfo is spelt differently from LLVM's feature."""
