"""GPU architectures: which of them a device runs, and what a target's name means."""

from __future__ import annotations

import pytest

from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpus import CUDA_ARCHITECTURES, GPU_NAMES, HostGpu, named_gpu
from sepc.errors import TargetError


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((7, 5), "sm_75"), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_87"), ((8, 9), "sm_86"), ((9, 0), "sm_90")],
)
def test_a_device_gets_the_latest_architecture_that_it_runs(capability: tuple[int, int], architecture: str) -> None:
    assert HostGpu("a GPU", capability).machine.architecture == architecture


def test_code_runs_on_later_minor_versions_of_its_major_version() -> None:
    device = HostGpu("NVIDIA L4", (8, 9))
    assert [name for name in CUDA_ARCHITECTURES if device.runs(name)] == ["sm_80", "sm_86"]


def test_what_is_known_of_a_device_replaces_the_figures_of_its_description() -> None:
    machine = HostGpu("NVIDIA A30", (8, 0), multiprocessors=56, l2_kib=24576).machine
    assert (machine.multiprocessors, machine.l2_kib) == (56, 24576)
    assert machine.dram_gb_per_s == GpuMachine.load("sm_80").dram_gb_per_s


@pytest.mark.parametrize("capability", [(7, 0), (12, 0)])
def test_a_device_without_kernels_is_refused_by_its_name(capability: tuple[int, int]) -> None:
    device = HostGpu("GeForce X", capability)
    with pytest.raises(TargetError, match=rf"no kernels for GeForce X, of compute capability {capability[0]}.0"):
        named_gpu("cuda", device)


def test_cuda_means_the_hosts_gpu_else_a_default() -> None:
    found = named_gpu("cuda", HostGpu("NVIDIA T4", (7, 5)))
    assert found is not None
    assert found.architecture == "sm_75"
    assert named_gpu("cuda", None) == GpuMachine.load("sm_80")


@pytest.mark.parametrize("name", GPU_NAMES)
def test_every_name_has_a_description(name: str) -> None:
    machine = named_gpu(name, None)
    assert machine is not None
    assert name in ("cuda", f"cuda:{machine.name}", machine.name)


@pytest.mark.parametrize("name", ["native", "arm64", "sm_80", "cuda:sm_88", ""])
def test_other_names_mean_no_gpu(name: str) -> None:
    assert named_gpu(name, None) is None
