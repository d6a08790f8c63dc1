"""The runners: that they agree with eager, what they use, and what is missing for them."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sepc.bench import peers
from sepc.bench.measure import measure
from sepc.bench.peers import AVX2, BUILDERS, NATIVE, PARTLY_AVX2, UNRESTRICTED, Job
from sepc.c_compiler import c_compiler
from tests.bench.results import job_of

SHORT_S = 1e-4


@pytest.fixture
def job() -> Job:
    return job_of()


def test_inductor_freezes_again_after_a_reset() -> None:
    from torch._dynamo.utils import counters

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    # The runner leaves the option set, with which Dynamo would keep the weights of all models of later tests alive.
    with torch._inductor.config.patch(freezing=False):
        runner = peers.inductor(Job(model, (torch.randn(1, 3, 32, 32),), 1))
        torch._dynamo.reset()  # as strict exports do, and so XNNPACK's partitioner
        counters.clear()
        with torch.inference_mode():
            runner.run()
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 1


@pytest.mark.parametrize(
    ("peer", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("xnnpack", "executorch")]
)
def test_peer_agrees_with_eager(job: Job, peer: str, package: str) -> None:
    pytest.importorskip(package)
    peer_result = measure(job, [peer], 1, turn_s=SHORT_S)[peer]
    assert peer_result.failure == ""
    assert peer_result.is_right
    assert peer_result.isa == NATIVE


def test_xnnpack_runs_by_xnnpack(job: Job) -> None:
    pytest.importorskip("executorch")
    assert peers.xnnpack(job).details["calls"] == {"executorch_call_delegate": 1}


def test_missing_package_is_reported(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)
    results = measure(job, ["eager", "xnnpack"], 1, turn_s=SHORT_S)
    assert results["eager"].is_right
    assert "executorch" in results["xnnpack"].failure


@pytest.mark.parametrize(("capability", "isa"), [("AVX512", UNRESTRICTED), ("AVX2", AVX2)])
def test_pytorch_without_the_environment_is_unrestricted(
    job: Job, monkeypatch: pytest.MonkeyPatch, capability: str, isa: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert peers.eager(job).isa == NATIVE
    assert peers.eager(Job(job.model, job.inputs, 1, AVX2)).isa == isa


def test_onnxruntime_is_unrestricted(job: Job) -> None:
    pytest.importorskip("onnxruntime")
    limited = Job(job.model, job.inputs, 1, AVX2)
    assert measure(limited, ["onnxruntime"], 1, turn_s=SHORT_S)["onnxruntime"].isa == UNRESTRICTED


@pytest.mark.parametrize(
    ("kernels", "isa"),
    [
        (["Convolution brgconv_avx2_f32", "Reorder jit_uni_f32"], AVX2),
        (["Convolution brgconv_avx2_f32", "Reduce jit_avx512_f32"], PARTLY_AVX2),
        (["Convolution brgconv_avx2_f32", "FullyConnected gemm_mlas_f32"], PARTLY_AVX2),
        (["Convolution brgconv_avx512_f32"], UNRESTRICTED),
    ],
)
def test_openvino_is_judged_by_its_kernels(job: Job, kernels: list[str], isa: str) -> None:
    assert peers._openvino_isa(Job(job.model, job.inputs, 1, AVX2), kernels) == isa
    assert peers._openvino_isa(job, kernels) == NATIVE


def test_openvino_tells_its_kernels(job: Job) -> None:
    pytest.importorskip("openvino")
    kernels = peers.openvino(job).details["kernels"]
    assert isinstance(kernels, dict)
    assert sum(count for name, count in kernels.items() if name.startswith("Convolution ")) == 1


@pytest.mark.parametrize("layout_is_known", [True, False])
def test_xnnpack_is_limited_only_if_its_description_of_the_processor_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout_is_known: bool
) -> None:
    has = dict.fromkeys(peers._CPUINFO_FLAGS, False) | dict.fromkeys(["avx", "fma", "avx2", "avx512f"], True)
    found = [0] * peers._CPUINFO_START + [int(flag) for flag in has.values()]
    if not layout_is_known:
        found.insert(0, 0)
    source = f"char cpuinfo_isa[100]; void cpuinfo_initialize() {{ char found[] = {{{str(found)[1:-1]}}}; "
    source += "__builtin_memcpy(cpuinfo_isa, found, sizeof found); }"
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libexecutorch_threadpool.so"
    subprocess.run([c_compiler(), "-shared", "-fPIC", "-xc", "-o", library, "-"], input=source.encode(), check=True)
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: package)
    monkeypatch.delitem(sys.modules, "executorch.extension.pybindings._C", raising=False)
    monkeypatch.setattr(peers, "_processor_has", lambda _flags: has)
    assert peers._limit_xnnpack() == (AVX2 if layout_is_known else UNRESTRICTED)
    left = (ctypes.c_char * len(found)).in_dll(ctypes.CDLL(str(library)), "cpuinfo_isa").raw
    # All AVX-512 gone and nothing else touched, or nothing touched at all.
    assert sum(left) == (3 if layout_is_known else 4)


def test_the_processor_has_avx2_where_pytorch_says_so() -> None:
    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert peers._processor_has(["avx2", "no_such_flag"]) == {"avx2": has_avx2, "no_such_flag": False}


def test_what_is_missing_for_a_peer_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not peers.why_missing("eager")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else object())
    assert peers.why_missing("openvino") == "onnx, onnxscript are not installed; pip install onnx onnxscript"
    assert not peers.why_missing("xnnpack")
    assert {*peers.NEEDS} < {*BUILDERS}
