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
``cuda``               this host's NVIDIA GPU, detected; on a host without one, ``cuda:sm_80``
``cuda:sm_<version>``  NVIDIA GPUs of a compute capability: 75, 80, 86, 87 or 90
``opencl``             any GPU with OpenCL
=====================  ===========================================================================

A target is a CPU. Of one with a GPU, that runs the kernels, and the CPU (any of this host's architecture) calls them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal

from sepc.cost_model.calibration import with_stored
from sepc.cost_model.cpus import ARM, CPUS, FAMILIES, X86, Family
from sepc.cost_model.detect import HostCpu, describe_host, host_cpu
from sepc.cost_model.gpu_machine import VECTOR, GpuMachine
from sepc.cost_model.gpus import CUDA, CUDA_ARCHITECTURES, GPU_NAMES, OPENCL, capability, named_gpu
from sepc.cost_model.machine import Machine
from sepc.cost_model.x86_cpus import FEATURES_LINUX_HIDES, X86_CPUS_TOO_OLD
from sepc.errors import InputError, TargetError
from sepc.host_gpu import host_gpu
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
        machine: figures of the CPU for the cost model.
        dtype: the type in which kernels compute what a model has in float32.
        gpu: the GPU that runs the kernels, with figures for the cost model; None if the CPU does.
    """

    name: str
    llvm_cpu: str
    features: tuple[str, ...]
    vector_bits: int
    machine: Machine
    dtype: str = "float32"
    gpu: GpuMachine | None = None

    @staticmethod
    def parse(name: str | Target) -> Target:
        """The target of that name; a Target is returned as it is.

        Raises:
            TargetError: the name is unknown, or 'native' or 'cuda' is a processor that sepc has no kernels for.
        """
        if isinstance(name, Target):
            return name
        if name == "native":
            return native_target(host_cpu())
        if (gpu := named_gpu(name, host_gpu() if name == CUDA else None)) is not None:
            return gpu_target(name, gpu)
        cpu = next((found for family in FAMILIES if (found := family.find(name)) is not None), None)
        if cpu is None:
            raise _unknown(name)
        return Target(name, cpu.name, cpu.target_features, cpu.vector_bits, Machine.load(cpu.machine))

    @staticmethod
    def known() -> tuple[str, ...]:
        """Every accepted name."""
        return ("native", *(name for family in FAMILIES for name in family.names), *GPU_NAMES)

    def with_machine(self, machine: Machine) -> Target:
        """The same target with other figures of its CPU, such as `sepc.calibrate` measures on a device."""
        return replace(self, machine=machine)

    @property
    def text(self) -> str:
        """The name, with LLVM's name of the core, or the GPU's architecture, where it does not say that."""
        core = self.llvm_cpu if self.gpu is None else self.gpu.architecture
        name = self.name if self.name.endswith(core) else f"{self.name} ({core})"
        return name if self.dtype == FLOAT32.name else f"{name} in {self.dtype}"

    @property
    def kind(self) -> Literal["llvm", "cuda", "opencl"]:
        """What generates the kernels' code."""
        if self.gpu is None:
            return "llvm"
        return "opencl" if self.gpu.architecture == OPENCL else "cuda"

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where PyTorch has the tensors of a call; OpenCL's buffers are copies of the CPU's."""
        return "cuda" if self.kind == "cuda" else "cpu"

    @property
    def planned_for(self) -> Machine | GpuMachine:
        """What runs the kernels, as the cost model sees it."""
        return self.gpu or self.machine

    @property
    def element(self) -> Element:
        """`dtype`, with what is to be known of it."""
        return ELEMENTS[self.dtype]

    @property
    def has_float16(self) -> bool:
        """Whether sepc has kernels for float16 on it: any GPU, and CPUs with the arithmetic of Armv8.2."""
        cpu = CPUS[self.llvm_cpu]
        return self.gpu is not None or (
            "fullfp16" in cpu.features and "-fullfp16" not in self.features and cpu.architecture == "aarch64"
        )

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
                why=f"{self.text} lacks the FP16 instructions of Armv8.2, which kernels for CPUs take",
                fix=f"leave out dtype, or compile for one that has it: {', '.join((*sorted(targets), CUDA, OPENCL))}",
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
        """The target's CPU as TVM's JSON.

        For Intel's AVX-512 cores LLVM sets 'prefer-256-bit'. That limits its own vectorisation only: kernels with
        explicit 512-bit vectors compile to the same zmm code with and without it (a test compiles one).
        """
        triple = {} if self.is_of_host_architecture else {"mtriple": TRIPLES[self.machine.architecture]}
        return {"kind": "llvm", **triple, "mcpu": self.llvm_cpu, "mattr": list(self.features)}

    def missing_features(self, host: HostCpu | None = None) -> tuple[str, ...]:
        """LLVM features that code for this target's CPU may use and the host (default: this one) lacks."""
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
    def missing_gpu(self) -> str:
        """The GPU that code for this target needs and this host lacks; empty if nothing is missing."""
        if self.gpu is None:
            return ""
        if self.kind == "opencl":
            return "" if find_spec("pyopencl") else "OpenCL from Python (pip install pyopencl)"
        found = host_gpu()
        if found is not None and found.runs(self.gpu.architecture):
            return ""
        major, minor = capability(self.gpu.architecture)
        return f"an NVIDIA GPU of compute capability {major}.{minor}, or of a later {major}.x"

    @property
    def is_runnable(self) -> bool:
        """Whether this host can run what is compiled for this target."""
        return not self.missing_features() and not self.missing_gpu

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
        if host is None and self.missing_gpu:
            raise TargetError(
                f"This host cannot run code compiled for '{self.name}'",
                where=f"target='{self.name}'",
                why=f"it lacks {self.missing_gpu}",
                fix="export it and run it where there is one, or compile with target='native'",
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


def gpu_target(name: str, gpu: GpuMachine) -> Target:
    """The target `name` for that GPU beside any CPU of this host's architecture; vectors are what a thread loads."""
    cpu = Target.parse("arm64" if host_cpu().architecture == "aarch64" else "x86-64-v3")
    return replace(cpu, name=name, vector_bits=32 * VECTOR, gpu=gpu)


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
    generic = ", ".join(("native", *_generic()))
    cores = "; ".join(f"{family.prefix}<core> with {', '.join(sorted(_cores(family)))}" for family in FAMILIES)
    gpus = f"for a GPU {CUDA}:<architecture> with {', '.join(CUDA_ARCHITECTURES)}"
    why = f"known are {generic}, and for a core of LLVM's {cores}; {gpus}"
    return TargetError(f"There is no target '{name}'", where=where, why=why, fix=fix)


def _generic() -> tuple[str, ...]:
    """Names that say nothing of a particular core."""
    return (*(one for family in FAMILIES for one in family.generic), CUDA, OPENCL)


def _cores(family: Family) -> list[str]:
    """The names that may follow the family's prefix."""
    return [name.removeprefix(family.prefix) for name in family.names if name.startswith(family.prefix)]


def _near(name: str) -> list[str]:
    """Known names that look like what was written; a bare core name ('znver4') and other spellings count as near."""
    if gpus := _near_gpus(name.lower()):
        return gpus
    spelling = name.lower().replace("_", "-").replace("aarch64", "arm64")
    family = next((one for one in FAMILIES if spelling.startswith(one.prefix)), None)
    core = spelling.removeprefix(family.prefix) if family else spelling
    near = {one.prefix + found: found for one in FAMILIES if family in (None, one) for found in _cores(one)}
    exact = [full for full, found in near.items() if found == core]
    if exact:
        return exact
    close = difflib.get_close_matches(core, near.values(), n=2, cutoff=0.7)
    generic = _generic()
    if not close or spelling in generic:
        return difflib.get_close_matches(spelling, ("native", *generic), n=1, cutoff=0.5)
    return [full for found in close for full, own in near.items() if own == found]


def _near_gpus(spelling: str) -> list[str]:
    """Names of GPUs that look like what was written: of an architecture without the prefix, or a version alone."""
    if not spelling.startswith((CUDA, "sm", "compute")):
        return []
    version = "".join(letter for letter in spelling if letter.isdigit())
    near = difflib.get_close_matches(f"sm_{version}", CUDA_ARCHITECTURES, n=2, cutoff=0.5) if version else []
    return [f"{CUDA}:{one}" for one in near] or [CUDA]
