"""The 64-bit Arm cores that sepc builds for, under LLVM's names: instruction set and machine description of each.

Kernels use NEON, which every such core has. SVE is left out where a core has it: vectors of 128 bits are all that the
kernels ask for. As with `sepc.cost_model.x86_cpus`, a test compares the table with that of the LLVM inside TVM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LINUX_FLAG_OF_ARM_FEATURE: Final[dict[str, str]] = {
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "lse": "atomics",
    "rdm": "asimdrdm",
}
"""Where the flag in Linux' /proc/cpuinfo is spelt differently from LLVM's feature."""


@dataclass(frozen=True)
class ArmCpu:
    """One core as LLVM names it.

    Args:
        name: LLVM's name (``-mcpu``).
        machine: the machine description in ``machines/`` that represents it.
        features: LLVM features beyond Armv8.0 with NEON that the compiler may use unasked when it builds for this core.
        has_sve: whether LLVM would use SVE as well, unless it is told not to.
    """

    name: str
    machine: str
    features: tuple[str, ...]
    has_sve: bool

    architecture = "aarch64"
    vector_bits = 128

    @property
    def is_modest(self) -> bool:
        """Whether it has nothing beyond what every 64-bit Arm has."""
        return not self.features

    @property
    def target_features(self) -> tuple[str, ...]:
        """What LLVM is told beside the name: features to add or to leave out."""
        return ("-sve",) if self.has_sve else ()


_V81 = "lse rdm"
_V82 = f"{_V81} dotprod fullfp16"
_V86 = f"{_V82} bf16 i8mm"

# machine description, features, names. Descriptions stand in for relatives: by width and number of their FMA units and
# by what lies behind the first cache; small cores for in-order ones. "SVE" in front of features: has it.
_TABLE: Final[tuple[tuple[str, str, str], ...]] = (
    ("cortex-a53", "", "cortex-a34 cortex-a35 cortex-a53 thunderx thunderxt81 thunderxt83 thunderxt88"),
    ("cortex-a53", _V82, "cortex-a55 cortex-a65 cortex-a65ae neoverse-e1 cortex-r82 cortex-r82ae"),
    ("cortex-a53", f"SVE {_V86}", "cortex-a320 cortex-a510 cortex-a520 cortex-a520ae"),
    ("cortex-a53", f"SVE {_V86} mops", "c1-nano"),
    ("cortex-a72", "", "generic cortex-a57 cortex-a72 cortex-a73 kryo apple-a7"),
    ("cortex-a72", _V82, "cortex-a75"),
    ("cortex-a76", "", "exynos-m3"),
    ("cortex-a76", _V82, "cortex-a76 cortex-a76ae cortex-a77 cortex-a78 cortex-a78ae cortex-a78c exynos-m4 exynos-m5"),
    ("cortex-a76", f"{_V81} fullfp16", "carmel"),
    ("cortex-a76", f"SVE {_V86}", "cortex-a710 cortex-a715 cortex-a720 cortex-a720ae cortex-a725"),
    ("cortex-a76", f"SVE {_V86} mops", "c1-pro"),
    ("neoverse-n1", "rdm", "falkor"),
    ("neoverse-n1", f"{_V81}", "thunderx2t99 thunderx3t110"),
    ("neoverse-n1", f"{_V81} dotprod", "saphira"),
    ("neoverse-n1", _V82, "neoverse-n1 tsv110"),
    ("neoverse-n1", _V86, "ampere1 ampere1a"),
    ("neoverse-n1", f"{_V86} cssc", "ampere1b"),
    ("neoverse-n1", f"SVE {_V86} cssc", "ampere1c"),
    ("neoverse-n1", f"SVE {_V86}", "neoverse-n2 neoverse-n3"),
    ("neoverse-n1", f"SVE {_V86} mops", "fujitsu-monaka"),
    ("neoverse-n1", f"SVE {_V81} fullfp16", "a64fx"),
    ("neoverse-v1", _V82, "cortex-x1 cortex-x1c"),
    ("neoverse-v1", f"SVE {_V86}", "cortex-x2 cortex-x3 cortex-x4 cortex-x925 gb10 grace neoverse-512tvb neoverse-v1"),
    ("neoverse-v1", f"SVE {_V86}", "neoverse-v2 neoverse-v3 neoverse-v3ae olympus"),
    ("neoverse-v1", f"SVE {_V86} mops", "c1-premium c1-ultra"),
    ("neoverse-v1", _V86, "oryon-1"),
    ("apple-m1", "rdm", "apple-a10"),
    ("apple-m1", f"{_V81} fullfp16", "apple-a11 apple-a12"),
    ("apple-m1", _V82, "apple-a13 apple-a14"),
    ("apple-m1", _V86, "apple-a15 apple-a16 apple-a17 apple-m4"),
    ("apple-m1", f"{_V86} cssc", "apple-m5"),
)

ARM_CPUS: Final[dict[str, ArmCpu]] = {
    name: ArmCpu(name, machine, tuple(sorted(set(features.split()) - {"SVE"})), features.startswith("SVE"))
    for machine, features, names in _TABLE
    for name in names.split()
}
"""Every 64-bit Arm core that sepc builds for."""

ARM_ALIASES: Final[dict[str, str]] = {"apple-m1": "apple-a14", "apple-m2": "apple-a15", "apple-m3": "apple-a16"}
"""Names that users know, and LLVM's table under others."""
