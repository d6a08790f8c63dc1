"""The machine that a model is compiled for, by name.

=====================  ===========================================================================
name                   meaning
=====================  ===========================================================================
``native``             this host, detected, with the figures that `sepc.calibrate` measured if it has run
``x86-64-v3``          any x86 with AVX2 and FMA
``x86-64-v4``          any x86 with AVX-512 (F, BW, CD, DQ, VL)
``x86:<llvm cpu>``     a particular core, e.g. ``x86:znver4``, ``x86:skylake-avx512``
``arm64``              any 64-bit Arm (NEON), with the figures of a Cortex-A72
``arm64:<llvm cpu>``   a particular core, e.g. ``arm64:cortex-a76``, ``arm64:neoverse-n1``, ``arm64:apple-m1``
=====================  ===========================================================================
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sepc.cost_model.calibration import with_stored
from sepc.cost_model.cpus import ARM, CPUS, FAMILIES, X86, Family
from sepc.cost_model.detect import HostCpu, describe_host, host_cpu
from sepc.cost_model.machine import Machine
from sepc.cost_model.x86_cpus import FEATURES_LINUX_HIDES, X86_CPUS_TOO_OLD
from sepc.errors import InputError, TargetError
from sepc.ir.element import ELEMENTS, FLOAT16, FLOAT32, Element

if TYPE_CHECKING:
    import torch

TRIPLES: Final = {"x86-64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
"""What LLVM calls a system of each architecture; kernels ask nothing of the system, only where it keeps arguments."""


@dataclass(frozen=True)
class Target:
    """What to compile for.

    Args:
        name: as the user wrote it.
        llvm_cpu: LLVM's name of the core.
        features: LLVM features to add ('+avx2') or to leave out ('-gfni', where this host's hypervisor hides it).
        vector_bits: width of the vectors that kernels use.
        machine: figures for the cost model.
        dtype: the type in which kernels compute what a model has in float32.
    """

    name: str
    llvm_cpu: str
    features: tuple[str, ...]
    vector_bits: int
    machine: Machine
    dtype: str = "float32"

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
        cpu = next((found for family in FAMILIES if (found := family.find(name)) is not None), None)
        if cpu is None:
            raise _unknown(name)
        return Target(name, cpu.name, cpu.target_features, cpu.vector_bits, Machine.load(cpu.machine))

    @staticmethod
    def known() -> tuple[str, ...]:
        """Every accepted name."""
        return ("native", *(name for family in FAMILIES for name in family.names))

    def with_machine(self, machine: Machine) -> Target:
        """The same target with other figures for the cost model, such as `sepc.calibrate` measures on a device."""
        return replace(self, machine=machine)

    @property
    def text(self) -> str:
        """The name, with LLVM's name of the core where it does not say that."""
        name = self.name if self.name.endswith(self.llvm_cpu) else f"{self.name} ({self.llvm_cpu})"
        return name if self.dtype == FLOAT32.name else f"{name} in {self.dtype}"

    @property
    def element(self) -> Element:
        """`dtype`, with what is to be known of it."""
        return ELEMENTS[self.dtype]

    @property
    def has_float16(self) -> bool:
        """Whether it has arithmetic on vectors of float16 that sepc has kernels for, which is that of Armv8.2."""
        cpu = CPUS[self.llvm_cpu]
        return "fullfp16" in cpu.features and "-fullfp16" not in self.features and cpu.architecture == "aarch64"

    def computing_in(self, dtype: str | torch.dtype) -> Target:
        """This target with kernels that compute in `dtype`.

        Raises:
            InputError: kernels compute in no such type. TargetError: not on this target.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in ELEMENTS:
            choices = " or ".join(f'"{one}"' for one in ELEMENTS)
            raise InputError(f"Kernels do not compute in {name!r}", where="dtype", fix=f"give {choices}")
        element = ELEMENTS[name]
        if element == FLOAT16 and not self.has_float16:
            targets = [one for one in ARM.names if (cpu := ARM.find(one)) is not None and "fullfp16" in cpu.features]
            raise TargetError(
                f"There is no arithmetic in float16 for the target '{self.name}'",
                where=f"target='{self.name}', dtype='{name}'",
                why=f"it takes a 64-bit Arm core with the FP16 instructions of Armv8.2, which {self.llvm_cpu} lacks",
                fix=f"leave out dtype, or compile for one that has it: {', '.join(sorted(targets))}",
            )
        return replace(self, dtype=element.name)

    @property
    def is_of_host_architecture(self) -> bool:
        """Whether this host could load code for this target, if not run it."""
        return self.machine.architecture == host_cpu().architecture

    @property
    def vector_lanes(self) -> int:
        """fp32 values in one vector."""
        return self.vector_bits // 32

    def llvm_target(self) -> dict[str, Any]:
        """The target as TVM's JSON.

        For Intel's AVX-512 cores LLVM sets 'prefer-256-bit'. That limits its own vectorisation only: kernels with
        explicit 512-bit vectors compile to the same zmm code with and without it (a test compiles one).
        """
        triple = {} if self.is_of_host_architecture else {"mtriple": TRIPLES[self.machine.architecture]}
        return {"kind": "llvm", **triple, "mcpu": self.llvm_cpu, "mattr": list(self.features)}

    def missing_features(self, host: HostCpu | None = None) -> tuple[str, ...]:
        """LLVM features that code for this target may use and the host (default: this one) lacks."""
        host = host or host_cpu()
        cpu = CPUS[self.llvm_cpu]
        if host.architecture != cpu.architecture:
            return (f"the {cpu.architecture} architecture (the host is '{host.architecture}')",)
        if host.flags is None:  # Not Linux: features cannot be read.
            certain = cpu.is_modest or host.llvm_cpu == self.llvm_cpu
            return () if certain else (f"certainty about {self.llvm_cpu}'s features",)
        left_out = {feature[1:] for feature in self.features if feature.startswith("-")}
        wanted = tuple(name for name in cpu.features if name not in left_out)
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
    core = CPUS[cpu.llvm_cpu]
    hidden = tuple(f"-{name}" for name in cpu.lacks(core.features))
    return Target("native", core.name, core.target_features + hidden, core.vector_bits, machine)


def _unknown(name: str) -> TargetError:
    where = f"target='{name}'"
    if name.removeprefix(X86.prefix) in X86_CPUS_TOO_OLD:
        return TargetError(
            f"There are no kernels for the target '{name}'",
            where=where,
            why="kernels need AVX2 and FMA, which this core lacks",
            fix="use 'x86-64-v3' or a later core",
        )
    near = _near(name)
    fix = f"did you mean {' or '.join(repr(candidate) for candidate in near)}?" if near else "use one of these names"
    generic = ", ".join(("native", *(one for family in FAMILIES for one in family.generic)))
    cores = "; ".join(f"{family.prefix}<core> with {', '.join(sorted(_cores(family)))}" for family in FAMILIES)
    why = f"known are {generic}, and for a core of LLVM's {cores}"
    return TargetError(f"There is no target '{name}'", where=where, why=why, fix=fix)


def _cores(family: Family) -> list[str]:
    """The names that may follow the family's prefix."""
    return [name.removeprefix(family.prefix) for name in family.names if name.startswith(family.prefix)]


def _near(name: str) -> list[str]:
    """Known names that look like what was written; a bare core name ('znver4') and other spellings count as near."""
    spelling = name.lower().replace("_", "-").replace("aarch64", "arm64")
    family = next((one for one in FAMILIES if spelling.startswith(one.prefix)), None)
    core = spelling.removeprefix(family.prefix) if family else spelling
    near = {one.prefix + found: found for one in FAMILIES if family in (None, one) for found in _cores(one)}
    exact = [full for full, found in near.items() if found == core]
    if exact:
        return exact
    close = difflib.get_close_matches(core, near.values(), n=2, cutoff=0.7)
    generic = [found for one in FAMILIES for found in one.generic]
    if not close or spelling in generic:
        return difflib.get_close_matches(spelling, ("native", *generic), n=1, cutoff=0.5)
    return [full for found in close for full, own in near.items() if own == found]
