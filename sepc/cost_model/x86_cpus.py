"""The x86 cores that sepc builds for, under LLVM's names: instruction set and machine description of each.

LLVM compiles for a generic core when it does not know a name, and says so only in a log line. So names are checked
against this literal table; a test compares it with the table of the LLVM that is inside TVM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

LEVEL_FEATURES: Final[dict[int, tuple[str, ...]]] = {
    3: ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt"),
    4: (
        *("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt"),
        *("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
    ),
}
"""LLVM features of the levels x86-64-v3 and x86-64-v4 (x86-64 psABI, section 'Micro-Architecture Levels') beyond v2."""

LINUX_FLAG_OF_FEATURE: Final[dict[str, str]] = {
    "bmi": "bmi1",
    "lzcnt": "abm",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
}
"""Where the flag in Linux' /proc/cpuinfo is spelt differently from LLVM's feature."""

FEATURES_LINUX_HIDES: Final = frozenset(
    {
        *("avx10.1", "avx10.2", "avxifma", "avxneconvert", "avxvnniint8", "avxvnniint16"),
        *("egpr", "ccmp", "nf", "ndd", "zu", "ppx", "push2pop2"),
    }
)
"""Features without a reliable flag in /proc/cpuinfo (arch/x86/include/asm/cpufeatures.h of the Linux kernel)."""


@dataclass(frozen=True)
class X86Cpu:
    """One core as LLVM names it.

    Args:
        name: LLVM's name (``-mcpu``).
        level: 3 for AVX2 + FMA (x86-64-v3), 4 for AVX-512 with VL, BW, DQ, CD (x86-64-v4).
        machine: the machine description in ``machines/`` that represents it.
        extra_features: LLVM features beyond the level that the compiler may use unasked when it builds for this core.
            (AMX, cryptography and the like are left out: they are reached through intrinsics only.)
    """

    name: str
    level: Literal[3, 4]
    machine: str
    extra_features: tuple[str, ...] = ()

    architecture = "x86-64"

    @property
    def features(self) -> tuple[str, ...]:
        """LLVM features that code for this core may use."""
        return (*self.level_features, *self.extra_features)

    @property
    def target_features(self) -> tuple[str, ...]:
        """What LLVM is told beside the name."""
        return tuple(f"+{name}" for name in self.level_features)

    @property
    def is_modest(self) -> bool:
        """Whether it has AVX2 and what goes with it, which is a fair bet, and nothing more, which is not."""
        return self.level == 3 and not self.extra_features

    @property
    def vector_bits(self) -> int:
        """Width of the widest vectors that kernels use."""
        return 512 if self.level == 4 else 256

    @property
    def level_features(self) -> tuple[str, ...]:
        """LLVM features of the core's x86-64 level."""
        return LEVEL_FEATURES[self.level]


_ICELAKE = "avx512bitalg avx512ifma avx512vbmi avx512vbmi2 avx512vnni avx512vpopcntdq gfni"
_SAPPHIRE_RAPIDS = f"{_ICELAKE} avx512bf16 avx512fp16 avxvnni"
_ARROWLAKE = "avxifma avxneconvert avxvnni avxvnniint8 gfni"
_LUNARLAKE = f"{_ARROWLAKE} avxvnniint16"
_APX = "egpr ccmp nf ndd zu ppx push2pop2"
_AVX10_2 = f"{_SAPPHIRE_RAPIDS} avx10.1 avx10.2 avxifma avxneconvert avxvnniint8 avxvnniint16 {_APX}"

# name, level, machine description, extra features. Descriptions stand in for close relatives; the generic ones for
# cores that are weaker than most of their level: 128-bit data paths (efficiency cores, Zen 1) or one 512-bit FMA pipe
# (client Ice Lake and its successors).
_TABLE: Final[tuple[tuple[str, Literal[3, 4], str, str], ...]] = (
    ("x86-64-v3", 3, "x86-64-v3", ""),
    ("x86-64-v4", 4, "x86-64-v4", ""),
    # AMD
    ("bdver4", 3, "x86-64-v3", "fma4 xop tbm"),
    ("znver1", 3, "x86-64-v3", ""),
    ("znver2", 3, "znver3", ""),
    ("znver3", 3, "znver3", ""),
    ("znver4", 4, "znver4", f"{_ICELAKE} avx512bf16"),
    ("znver5", 4, "znver5", f"{_ICELAKE} avx512bf16 avxvnni"),
    # Intel, performance cores without AVX-512
    ("haswell", 3, "haswell", ""),
    ("core-avx2", 3, "haswell", ""),
    ("broadwell", 3, "haswell", ""),
    ("skylake", 3, "haswell", ""),
    ("alderlake", 3, "haswell", "avxvnni gfni"),
    ("raptorlake", 3, "haswell", "avxvnni gfni"),
    ("meteorlake", 3, "haswell", "avxvnni gfni"),
    ("arrowlake", 3, "haswell", _ARROWLAKE),
    ("arrowlake-s", 3, "haswell", _LUNARLAKE),
    ("lunarlake", 3, "haswell", _LUNARLAKE),
    ("pantherlake", 3, "haswell", _LUNARLAKE),
    ("wildcatlake", 3, "haswell", _LUNARLAKE),
    # Intel, efficiency cores; and Xeon Phi, whose AVX-512 lacks VL and BW and so counts as level 3
    ("gracemont", 3, "x86-64-v3", "avxvnni gfni"),
    ("sierraforest", 3, "x86-64-v3", _ARROWLAKE),
    ("grandridge", 3, "x86-64-v3", _ARROWLAKE),
    ("clearwaterforest", 3, "x86-64-v3", _LUNARLAKE),
    ("knl", 3, "x86-64-v3", "avx512f avx512cd"),
    ("knm", 3, "x86-64-v3", "avx512f avx512cd avx512vpopcntdq"),
    # Intel, AVX-512
    ("skylake-avx512", 4, "skylake-avx512", ""),
    ("skx", 4, "skylake-avx512", ""),
    ("cascadelake", 4, "cascadelake", "avx512vnni"),
    ("cooperlake", 4, "cascadelake", "avx512bf16 avx512vnni"),
    ("cannonlake", 4, "x86-64-v4", "avx512ifma avx512vbmi"),
    ("icelake-client", 4, "x86-64-v4", _ICELAKE),
    ("tigerlake", 4, "x86-64-v4", _ICELAKE),
    ("rocketlake", 4, "x86-64-v4", _ICELAKE),
    ("icelake-server", 4, "icelake-server", _ICELAKE),
    ("sapphirerapids", 4, "sapphirerapids", _SAPPHIRE_RAPIDS),
    ("emeraldrapids", 4, "sapphirerapids", _SAPPHIRE_RAPIDS),
    ("graniterapids", 4, "sapphirerapids", _SAPPHIRE_RAPIDS),
    ("graniterapids-d", 4, "sapphirerapids", _SAPPHIRE_RAPIDS),
    ("diamondrapids", 4, "sapphirerapids", _AVX10_2),
    ("novalake", 4, "x86-64-v4", _AVX10_2),
)

X86_CPUS: Final[dict[str, X86Cpu]] = {
    name: X86Cpu(name, level, machine, tuple(sorted(extra.split()))) for name, level, machine, extra in _TABLE
}
"""Every x86 core that sepc builds for."""

_TOO_OLD = """
amdfam10 athlon athlon-4 athlon-fx athlon-mp athlon-tbird athlon-xp athlon64 athlon64-sse3 atom barcelona bdver1
bdver2 bdver3 bonnell btver1 btver2 c3 c3-2 core-avx-i core2 corei7 corei7-avx generic geode goldmont goldmont-plus
i386 i486 i586 i686 ivybridge k6 k6-2 k6-3 k8 k8-sse3 lakemont nehalem nocona opteron opteron-sse3 penryn pentium
pentium-m pentium-mmx pentium2 pentium3 pentium3m pentium4 pentium4m pentiumpro prescott sandybridge silvermont slm
tremont westmere winchip-c6 winchip2 x86-64 x86-64-v2 yonah
"""

X86_CPUS_TOO_OLD: Final = frozenset(_TOO_OLD.split())
"""Names that LLVM knows but that lack AVX2 and FMA, for which sepc has no kernels."""
