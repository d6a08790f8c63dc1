"""The machine that a model is compiled for, by name.

=====================  ===========================================================================
name                   meaning
=====================  ===========================================================================
``native``             this host, detected, with the figures that `sepc.calibrate` measured if it has run
``x86-64-v3``          any x86 with AVX2 and FMA
``x86-64-v4``          any x86 with AVX-512 (F, BW, CD, DQ, VL)
``x86:<llvm cpu>``     a particular core, e.g. ``x86:znver4``, ``x86:skylake-avx512``
=====================  ===========================================================================
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Final

from sepc.cost_model.calibration import with_stored
from sepc.cost_model.detect import HostCpu, describe_host, host_cpu
from sepc.cost_model.machine import Machine
from sepc.cost_model.x86_cpus import FEATURES_LINUX_HIDES, X86_CPUS, X86_CPUS_TOO_OLD, X86Cpu
from sepc.errors import TargetError

X86_PREFIX: Final = "x86:"
GENERIC_NAMES: Final = ("x86-64-v3", "x86-64-v4")


@dataclass(frozen=True)
class Target:
    """What to compile for.

    Args:
        name: as the user wrote it.
        llvm_cpu: LLVM's name of the core.
        features: LLVM features to add ('+avx2') or to leave out ('-gfni', where this host's hypervisor hides it).
        vector_bits: width of the vectors that kernels use.
        machine: figures for the cost model.
    """

    name: str
    llvm_cpu: str
    features: tuple[str, ...]
    vector_bits: int
    machine: Machine

    @staticmethod
    def parse(name: str | Target) -> Target:
        """The target of that name; a Target is returned as it is.

        Raises:
            TargetError: the name is unknown, or 'native' is a processor that sepc has no kernels for.
        """
        if isinstance(name, Target):
            return name
        if name == "native":
            return native_target(host_cpu())
        cpu_name = name.removeprefix(X86_PREFIX)
        if cpu_name in X86_CPUS and (name.startswith(X86_PREFIX) or name in GENERIC_NAMES):
            cpu = X86_CPUS[cpu_name]
            return Target(name, cpu.name, _plus(cpu), cpu.vector_bits, Machine.load(cpu.machine))
        raise _unknown(name, cpu_name)

    @staticmethod
    def known() -> tuple[str, ...]:
        """Every accepted name."""
        return ("native", *GENERIC_NAMES, *(X86_PREFIX + name for name in X86_CPUS if name not in GENERIC_NAMES))

    @property
    def vector_lanes(self) -> int:
        """fp32 values in one vector."""
        return self.vector_bits // 32

    def llvm_target(self) -> dict[str, Any]:
        """The target as TVM's JSON.

        For Intel's AVX-512 cores LLVM sets 'prefer-256-bit'. That limits its own vectorisation only: kernels with
        explicit 512-bit vectors compile to the same zmm code with and without it (a test compiles one).
        """
        return {"kind": "llvm", "mcpu": self.llvm_cpu, "mattr": list(self.features)}

    def missing_features(self, host: HostCpu | None = None) -> tuple[str, ...]:
        """LLVM features that code for this target may use and the host (default: this one) lacks."""
        host = host or host_cpu()
        if host.architecture != "x86-64":
            return (f"the x86-64 architecture (the host is '{host.architecture}')",)
        cpu = X86_CPUS[self.llvm_cpu]
        if host.flags is None:
            # Not Linux: features cannot be read. AVX2 is a fair bet, more is not.
            return () if cpu.level == 3 and not cpu.extra_features else (f"certainty about {self.llvm_cpu}'s features",)
        left_out = {feature[1:] for feature in self.features if feature.startswith("-")}
        wanted = tuple(name for name in (*cpu.level_features, *cpu.extra_features) if name not in left_out)
        if host.llvm_cpu == self.llvm_cpu:
            wanted = tuple(name for name in wanted if name not in FEATURES_LINUX_HIDES)
        return host.lacks(wanted)

    @property
    def is_runnable(self) -> bool:
        """Whether this host can run what is compiled for this target."""
        return not self.missing_features()

    def require_runnable(self, host: HostCpu | None = None) -> None:
        """Nothing, if the host (default: this one) can run code for this target.

        Raises:
            TargetError: it cannot; the message names the missing features.
        """
        if missing := self.missing_features(host):
            raise TargetError(
                f"This host cannot run code compiled for '{self.name}'",
                where=f"target='{self.name}'",
                why=f"it lacks {', '.join(missing)}",
                fix="compile with target='native', or run on a machine that has these features",
            )


def native_target(cpu: HostCpu) -> Target:
    """The target 'native' on a host with that processor.

    Raises:
        TargetError: sepc has no kernels for it.
    """
    machine = with_stored(describe_host(cpu), cpu.identity)
    core = X86_CPUS[cpu.llvm_cpu]
    hidden = tuple(f"-{name}" for name in cpu.lacks(core.extra_features))
    return Target("native", core.name, _plus(core) + hidden, core.vector_bits, machine)


def _plus(cpu: X86Cpu) -> tuple[str, ...]:
    return tuple(f"+{name}" for name in cpu.level_features)


def _unknown(name: str, cpu_name: str) -> TargetError:
    where = f"target='{name}'"
    if cpu_name in X86_CPUS_TOO_OLD:
        return TargetError(
            f"There are no kernels for the target '{name}'",
            where=where,
            why="kernels need AVX2 and FMA, which this core lacks",
            fix="use 'x86-64-v3' or a later core",
        )
    near = _near(name, cpu_name)
    fix = f"did you mean {' or '.join(repr(candidate) for candidate in near)}?" if near else "use one of these names"
    cores = ", ".join(sorted(core for core in X86_CPUS if core not in GENERIC_NAMES))
    known = f"known are native, {', '.join(GENERIC_NAMES)} and x86:<core> with a core of LLVM's: {cores}"
    return TargetError(f"There is no target '{name}'", where=where, why=known, fix=fix)


def _near(name: str, cpu_name: str) -> list[str]:
    """Known names that look like what was written; a bare core name ('znver4') and other spellings count as near."""
    spelling = cpu_name.lower().replace("_", "-")
    if X86_PREFIX + spelling in Target.known():
        return [X86_PREFIX + spelling]
    near_cores = difflib.get_close_matches(spelling, X86_CPUS, n=2, cutoff=0.7)
    near = [core if core in GENERIC_NAMES else X86_PREFIX + core for core in near_cores]
    return near or difflib.get_close_matches(name.lower(), ("native", *GENERIC_NAMES), n=1, cutoff=0.5)
