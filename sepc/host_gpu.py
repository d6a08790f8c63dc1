"""The GPU of this host, from PyTorch where it has CUDA, else from nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from typing import Final

from sepc.cost_model.gpus import HostGpu

NVIDIA_SMI: Final = "nvidia-smi"
TIMEOUT_S: Final = 10
"""A driver that does not answer within this counts as no GPU."""


@cache
def host_gpu() -> HostGpu | None:
    """The first GPU that kernels could run on, or None."""
    return _from_torch() or _from_nvidia_smi()


def _from_torch() -> HostGpu | None:
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    l2_kib = found.L2_cache_size // 1024
    return HostGpu(found.name, (found.major, found.minor), found.multi_processor_count, l2_kib)


def _from_nvidia_smi() -> HostGpu | None:
    """The GPU of a host whose PyTorch has no CUDA."""
    if shutil.which(NVIDIA_SMI) is None:
        return None
    command = [NVIDIA_SMI, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_smi(done.stdout) if done.returncode == 0 else None


def parse_smi(text: str) -> HostGpu | None:
    """The first GPU that a line ``name, major.minor`` tells; None if none does."""
    for line in text.splitlines():
        name, _, capability = line.rpartition(",")
        major, _, minor = capability.strip().partition(".")
        if name and major.isdigit() and minor.isdigit():
            return HostGpu(name.strip(), (int(major), int(minor)))
    return None
