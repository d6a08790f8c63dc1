"""Targets by name, what TVM is told, and which host can run them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import sepc
from sepc.cost_model.arm_cpus import ARM_ALIASES, ARM_CPUS
from sepc.cost_model.detect import HostCpu, host_cpu
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpus import HostGpu
from sepc.cost_model.x86_cpus import LEVEL_FEATURES, LINUX_FLAG_OF_FEATURE, X86_CPUS, X86_CPUS_TOO_OLD
from sepc.errors import InputError, TargetError
from sepc.ir.element import FLOAT16
from sepc.target import Target, native_target


def host_like(llvm_cpu: str, without: frozenset[str] = frozenset()) -> HostCpu:
    """A host with everything that LLVM assumes of that core, but ``without``."""
    cpu = X86_CPUS[llvm_cpu]
    features = set(cpu.level_features) | set(cpu.extra_features)
    flags = frozenset(LINUX_FLAG_OF_FEATURE.get(name, name) for name in features - without)
    return HostCpu("x86-64", llvm_cpu, flags, cpu.machine, is_virtual=True)


@pytest.mark.parametrize(
    ("name", "llvm_cpu", "vector_bits", "machine"),
    [
        ("x86-64-v3", "x86-64-v3", 256, "x86-64-v3"),
        ("x86-64-v4", "x86-64-v4", 512, "x86-64-v4"),
        ("x86:x86-64-v3", "x86-64-v3", 256, "x86-64-v3"),
        ("x86:znver4", "znver4", 512, "znver4"),
        ("x86:skylake-avx512", "skylake-avx512", 512, "skylake-avx512"),
        ("x86:alderlake", "alderlake", 256, "haswell"),
        ("x86:emeraldrapids", "emeraldrapids", 512, "sapphirerapids"),
    ],
)
def test_parse(name: str, llvm_cpu: str, vector_bits: int, machine: str) -> None:
    target = Target.parse(name)
    assert (target.name, target.llvm_cpu, target.vector_bits) == (name, llvm_cpu, vector_bits)
    assert target.machine.name == machine
    assert target.vector_lanes == vector_bits // 32
    assert ("+avx512f" in target.features) == (vector_bits == 512)
    assert {"+avx2", "+fma"} <= set(target.features)


def test_a_target_is_its_own_parse() -> None:
    target = Target.parse("x86-64-v3")
    assert Target.parse(target) is target
    assert hash(target) == hash(Target.parse("x86-64-v3"))


@pytest.mark.parametrize("name", [name for name in Target.known() if name != "native"])
def test_every_known_name_parses(name: str) -> None:
    target = Target.parse(name)
    assert target.vector_bits == (target.machine.vector_bits if target.gpu is None else 128)


def test_native_is_runnable() -> None:
    if not host_cpu().llvm_cpu:
        pytest.skip("no kernels for this host")
    target = Target.parse("native")
    target.require_runnable()
    assert target.is_runnable
    assert target.machine.cores <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("x86:znver6", r"'x86:znver5'"),
        ("znver4", r"'x86:znver4'"),
        ("skylake_avx512", r"'x86:skylake-avx512'"),
        ("x86:skylake_avx512", r"'x86:skylake-avx512'"),
        ("x86:Haswell", r"'x86:haswell'"),
        ("x86-64-v5", r"'x86-64-v4'"),
        ("natvie", r"'native'"),
        ("arm46", r"'arm64'"),
        ("cortex-a76", r"'arm64:cortex-a76'"),
        ("arm64:cortex_a77x", r"'arm64:cortex-a77'"),
        ("aarch64:apple-m1", r"'arm64:apple-m1'"),
        ("sm_80", r"'cuda:sm_80'"),
        ("cuda:sm_88", r"'cuda:sm_8[067]'"),
        ("cuda:90", r"'cuda:sm_90'"),
        ("cuda:compute_75", r"'cuda:sm_75'"),
        ("cuda:ampere", r"'cuda'"),
        ("openlc", r"'opencl'"),
    ],
)
def test_unknown_name_lists_the_known_and_suggests_the_near(name: str, suggestion: str) -> None:
    with pytest.raises(TargetError) as caught:
        Target.parse(name)
    message = str(caught.value)
    assert message.startswith(f"There is no target '{name}'.")
    assert f"Where: target='{name}'" in message
    assert (
        "known are native, x86-64-v3, x86-64-v4, arm64, cuda, opencl, and for a core of LLVM's x86:<core> with"
        in message
    )
    assert "for a GPU cuda:<architecture> with sm_75, sm_80, sm_86, sm_87, sm_90" in message
    assert all(cpu in message for cpu in (*X86_CPUS, *ARM_CPUS, *ARM_ALIASES) if cpu != "generic")
    assert caught.match(rf"did you mean .*{suggestion}")


def test_a_name_like_no_other() -> None:
    with pytest.raises(TargetError, match=r"What to do: use one of these names"):
        Target.parse("qqqqqqqqqqqq")


@pytest.mark.parametrize("name", ["x86:nehalem", "x86-64-v2", "x86:generic"])
def test_old_cores_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(TargetError, match=rf"no kernels for the target '{name}'(.|\n)*AVX2 and FMA(.|\n)*'x86-64-v3'"):
        Target.parse(name)


def test_host_that_lacks_features_is_refused_by_their_names() -> None:
    target = Target.parse("x86-64-v4")
    with pytest.raises(
        TargetError,
        match=r"cannot run code compiled for 'x86-64-v4'(.|\n)*lacks avx512bw, avx512cd, avx512dq, avx512f, avx512vl",
    ):
        target.require_runnable(host_like("znver3"))
    target.require_runnable(host_like("znver4"))


def test_a_cores_extra_features_count() -> None:
    assert Target.parse("x86:sapphirerapids").missing_features(host_like("znver5")) == ("avx512fp16",)
    assert Target.parse("x86:znver4").missing_features(host_like("znver5")) == ()


def test_features_that_linux_hides_are_taken_for_granted_on_the_same_core_only() -> None:
    target = Target.parse("x86:arrowlake")
    hidden = frozenset({"avxifma", "avxneconvert", "avxvnniint8"})
    assert target.missing_features(host_like("arrowlake", without=hidden)) == ()
    assert set(target.missing_features(host_like("alderlake"))) == hidden


def test_native_leaves_out_what_the_hypervisor_hides() -> None:
    host = host_like("znver5", without=frozenset({"gfni", "avx512bf16"}))
    target = native_target(host)
    assert {feature for feature in target.features if feature.startswith("-")} == {"-gfni", "-avx512bf16"}
    assert target.missing_features(host) == ()
    assert Target.parse("x86:znver5").missing_features(host) == ("avx512bf16", "gfni")


def test_other_architectures_run_nothing() -> None:
    arm = HostCpu("aarch64", llvm_cpu="", flags=None, machine_name="")
    with pytest.raises(TargetError, match=r"the x86-64 architecture \(the host is 'aarch64'\)"):
        Target.parse("x86-64-v3").require_runnable(arm)
    with pytest.raises(TargetError, match="no kernels for the processor"):
        native_target(HostCpu("riscv64", llvm_cpu="", flags=None, machine_name=""))


def test_where_features_cannot_be_read_avx2_is_assumed_and_more_is_not() -> None:
    macos = HostCpu("x86-64", "x86-64-v3", flags=None, machine_name="x86-64-v3")
    Target.parse("x86-64-v3").require_runnable(macos)
    native_target(macos).require_runnable(macos)
    with pytest.raises(TargetError, match="certainty about x86-64-v4's features"):
        Target.parse("x86-64-v4").require_runnable(macos)


# The tables against the LLVM that is inside TVM.


def _llvm_features(cpu: str) -> set[str]:
    tvm = pytest.importorskip("tvm")
    target = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": cpu})
    return {str(name) for name in tvm.get_global_func("target.llvm_get_cpu_features")(target)}


def test_names_are_llvms() -> None:
    tvm = pytest.importorskip("tvm")
    x86 = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu"})
    names = {str(name) for name in tvm.get_global_func("target.llvm_get_cpu_archlist")(x86)}
    # Names with underscores are aliases of the others, for function multi-versioning.
    assert set(X86_CPUS) | X86_CPUS_TOO_OLD == {name for name in names if "_" not in name}
    assert not set(X86_CPUS) & X86_CPUS_TOO_OLD


def test_features_are_llvms() -> None:
    optional = {feature for cpu in X86_CPUS.values() for feature in cpu.extra_features}
    for cpu in X86_CPUS.values():
        features = _llvm_features(cpu.name)
        assert set(cpu.level_features) <= features, cpu.name
        assert set(cpu.extra_features) == (features & optional) - set(cpu.level_features), cpu.name
        assert (set(LEVEL_FEATURES[4]) <= features) == (cpu.level == 4), cpu.name
    for name in sorted(X86_CPUS_TOO_OLD):
        assert not {"avx2", "fma"} <= _llvm_features(name), name


def test_arm_cores_are_llvms_and_so_are_their_features() -> None:
    tvm = pytest.importorskip("tvm")
    arm = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
    names = tvm.get_global_func("target.llvm_get_cpu_archlist")(tvm.target.Target(arm))
    assert set(ARM_CPUS) == {str(name) for name in names}
    known = {feature for cpu in ARM_CPUS.values() for feature in cpu.features}
    for cpu in (*ARM_CPUS.values(), *(replace(ARM_CPUS[old], name=new) for new, old in ARM_ALIASES.items())):
        target = tvm.target.Target({**arm, "mcpu": cpu.name})
        features = {str(name) for name in tvm.get_global_func("target.llvm_get_cpu_features")(target)}
        assert set(cpu.features) == features & known, cpu.name
        assert cpu.has_sve == ("sve" in features), cpu.name


@pytest.mark.parametrize(
    ("name", "llvm_cpu", "machine"),
    [
        ("arm64", "generic", "cortex-a72"),
        ("arm64:cortex-a72", "cortex-a72", "cortex-a72"),
        ("arm64:neoverse-v1", "neoverse-v1", "neoverse-v1"),
        ("arm64:apple-m1", "apple-a14", "apple-m1"),
    ],
)
def test_arm_targets(name: str, llvm_cpu: str, machine: str) -> None:
    target = Target.parse(name)
    assert (target.llvm_cpu, target.vector_lanes, target.machine.name) == (llvm_cpu, 4, machine)
    assert target.llvm_target()["mattr"] == (["-sve"] if llvm_cpu == "neoverse-v1" else [])


def test_an_arm_host_runs_what_its_features_allow() -> None:
    host = HostCpu(
        "aarch64", "cortex-a76", frozenset({"asimd", "asimddp", "asimdhp", "asimdrdm", "atomics"}), "cortex-a76"
    )
    for name in ("arm64", "arm64:cortex-a72", "arm64:cortex-a76", "arm64:neoverse-n1"):
        Target.parse(name).require_runnable(host)
    assert native_target(host).features == ()
    with pytest.raises(TargetError, match="lacks bf16, i8mm"):
        Target.parse("arm64:neoverse-n2").require_runnable(host)
    with pytest.raises(TargetError, match=r"the x86-64 architecture \(the host is 'aarch64'\)"):
        Target.parse("x86-64-v3").require_runnable(host)


@pytest.mark.parametrize(
    ("name", "register"),
    [("x86-64-v3", "ymm"), ("x86-64-v4", "zmm"), ("x86:skylake-avx512", "zmm"), ("x86:znver5", "zmm")],
)
def test_explicit_vectors_use_registers_of_the_targets_width(name: str, register: str) -> None:
    """Also where LLVM prefers 256-bit vectors."""
    tvm = pytest.importorskip("tvm")
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    target = Target.parse(name)
    lanes = target.vector_lanes
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        a, b, c = (T.arg(letter, T.buffer((lanes,), "float32")) for letter in "abc")
        vector = tvm.tirx.Ramp(0, 1, lanes)
        T.buffer_store(c, c[vector] + a[vector] * b[vector], [vector])
    library = tvm.compile(
        builder.get(),
        target=tvm.target.Target({**target.llvm_target(), "mtriple": "x86_64-linux-gnu"}),
        tir_pipeline="tirx",
    )
    assembly = library.mod.inspect_source("asm")
    fused = [line for line in assembly.splitlines() if "vfmadd" in line]
    assert fused
    assert all(register in line for line in fused)


@pytest.mark.parametrize("dtype", ["float16", torch.float16], ids=str)
@pytest.mark.parametrize("name", ["arm64:cortex-a76", "arm64:neoverse-n1", "arm64:apple-m1", "arm64:cortex-a55"])
def test_arm_cores_since_armv8_2_compute_in_float16(name: str, dtype: str | torch.dtype) -> None:
    target = Target.parse(name).computing_in(dtype)
    assert (target.element, target.text) == (FLOAT16, f"{Target.parse(name).text} in float16")
    assert target.machine.lanes(target.element) == 8
    assert target.computing_in("float32") == Target.parse(name)


@pytest.mark.parametrize("name", ["native", "arm64", "arm64:cortex-a72", "x86-64-v4", "x86:sapphirerapids"])
def test_other_targets_name_those_that_compute_in_float16(name: str) -> None:
    if name == "native" and Target.parse(name).has_float16:
        pytest.skip("this host has it")
    with pytest.raises(TargetError, match=f"no arithmetic in float16 for the target '{name}'") as caught:
        sepc.compile(torch.nn.Linear(3, 2), target=name, dtype="float16")
    listed = caught.value.fix.partition(": ")[2].split(", ")
    assert {"arm64:cortex-a76", "arm64:neoverse-n1", "arm64:apple-m1"} <= set(listed)
    assert all(Target.parse(one).has_float16 for one in listed)


def test_an_arm_host_without_the_instructions_has_no_float16() -> None:
    flags = frozenset({"asimd", "asimddp", "asimdrdm", "atomics"})
    with pytest.raises(TargetError, match="no arithmetic in float16"):
        native_target(HostCpu("aarch64", "cortex-a76", flags, "cortex-a76")).computing_in("float16")


def test_other_types_are_refused() -> None:
    with pytest.raises(InputError, match=r'Kernels do not compute in .bfloat16.(.|\n)*"float32" or "float16"'):
        Target.parse("arm64:cortex-a76").computing_in(torch.bfloat16)


def test_a_target_with_a_gpu_has_a_cpu_of_this_host_beside_it() -> None:
    target = Target.parse("cuda:sm_75")
    assert target.gpu == GpuMachine.load("sm_75")
    assert (target.kind, target.planned_for, target.vector_lanes) == ("cuda", target.gpu, 4)
    assert target.is_of_host_architecture
    assert target.llvm_target()["kind"] == "llvm"
    assert target.text == "cuda:sm_75"


def test_a_target_with_a_gpu_is_another_than_its_cpu_alone() -> None:
    targets = [Target.parse(name) for name in ("cuda:sm_75", "cuda:sm_80", "opencl", "x86-64-v3")]
    assert len(set(targets)) == len(targets)
    assert [target.kind for target in targets] == ["cuda", "cuda", "opencl", "llvm"]


def test_cuda_is_the_hosts_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.target.host_gpu", lambda: HostGpu("NVIDIA L4", (8, 9), multiprocessors=58))
    target = Target.parse("cuda")
    assert target.text == "cuda (sm_86)"
    assert target.gpu is not None
    assert target.gpu.multiprocessors == 58
    assert target.missing_gpu == ""
    assert Target.parse("cuda:sm_90").missing_gpu == "an NVIDIA GPU of compute capability 9.0, or of a later 9.x"


def test_a_host_without_a_gpu_is_refused_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.target.host_gpu", lambda: None)
    target = Target.parse("cuda")
    assert not target.is_runnable
    with pytest.raises(TargetError, match=r"cannot run code compiled for 'cuda'(.|\n)*compute capability 8\.0"):
        target.require_runnable()


def test_opencl_needs_its_python_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepc.target.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"it lacks OpenCL from Python \(pip install pyopencl\)"):
        Target.parse("opencl").require_runnable()


@pytest.mark.parametrize("name", ["cuda:sm_75", "opencl"])
def test_gpus_compute_what_lies_in_memory_as_float16(name: str) -> None:
    target = Target.parse(name).computing_in(torch.float16)
    assert target.element == FLOAT16
    assert target.text.endswith("in float16")
