"""The GPU architectures that sepc builds for, as targets name them, and which of them a device runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from sepc.cost_model.gpu_machine import GpuMachine
from sepc.errors import TargetError

CUDA: Final = "cuda"
OPENCL: Final = "opencl"
CUDA_ARCHITECTURES: Final = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_90")
DEFAULT_ARCHITECTURE: Final = "sm_80"
"""What 'cuda' means on a host without a GPU."""
EMBEDDED: Final = frozenset({"sm_87"})
"""Code for these (Jetson) runs on just these: what runs on another minor version holds for discrete GPUs only."""
GPU_NAMES: Final = (CUDA, *(f"{CUDA}:{name}" for name in CUDA_ARCHITECTURES), OPENCL)
"""Every name of a target with a GPU."""


@dataclass(frozen=True)
class HostGpu:
    """A GPU of this host.

    Attributes:
        name: what its driver calls it. capability: its compute capability, (major, minor).
        multiprocessors, l2_kib: as in `GpuMachine`; 0 where unknown.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int = 0
    l2_kib: int = 0

    def runs(self, architecture: str) -> bool:
        """Whether it runs what is compiled for `architecture`: of its own major version, and no later one."""
        major, minor = capability(architecture)
        if architecture in EMBEDDED:
            return self.capability == (major, minor)
        return self.capability[0] == major and self.capability[1] >= minor

    @property
    def machine(self) -> GpuMachine:
        """The description that fits it best, with what is known of it.

        Raises:
            TargetError: sepc builds for none of the architectures that it runs.
        """
        able = [name for name in CUDA_ARCHITECTURES if self.runs(name)]
        if not able:
            major, minor = self.capability
            raise TargetError(
                f"There are no kernels for {self.name}, of compute capability {major}.{minor}",
                where="target='cuda'",
                why=f"sepc builds for {', '.join(CUDA_ARCHITECTURES)}",
                fix="compile for one of these, as 'cuda:sm_80', and run it elsewhere; or use a CPU as the target",
            )
        described = GpuMachine.load(max(able, key=capability))
        return replace(
            described,
            multiprocessors=self.multiprocessors or described.multiprocessors,
            l2_kib=self.l2_kib or described.l2_kib,
        )


def capability(architecture: str) -> tuple[int, int]:
    """The compute capability, (major, minor), of a CUDA architecture."""
    digits = architecture.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


def named_gpu(name: str, host: HostGpu | None) -> GpuMachine | None:
    """The GPU that a target of that name means on a host with that GPU, or with none; None if it means none.

    Raises:
        TargetError: it means the host's GPU, which sepc builds no kernels for.
    """
    if name == CUDA:
        return GpuMachine.load(DEFAULT_ARCHITECTURE) if host is None else host.machine
    if name not in GPU_NAMES:
        return None
    return GpuMachine.load(name.removeprefix(f"{CUDA}:"))
