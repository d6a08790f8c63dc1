"""The comparison: turns, checks of outputs, failures of single runners, tables, files; with runners that are free."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import compare, peers, report
from benchmarks.measure import ModelResult, PeerResult, describe, measure, relative_error
from benchmarks.peers import AVX2, BUILDERS, NATIVE, PARTLY_AVX2, UNRESTRICTED, Job, Runner
from sepc.c_compiler import c_compiler

SHORT_S = 1e-4


@pytest.fixture
def job() -> Job:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval().requires_grad_(False)
    return Job(model, (torch.randn(1, 3, 8, 8),), threads=1)


def altered(job: Job, change: float) -> Runner:
    """Eager, but with `change` added to its output."""
    return Runner(lambda: job.model(*job.inputs) + change, lambda result: [torch.as_tensor(result)])


def result(median_ms: float, error: float = 0.0, failure: str = "", isa: str = NATIVE) -> PeerResult:
    return PeerResult([median_ms] if not failure else [], median_ms, error, 1.0, failure, isa=isa)


def row(model: str = "net", threads: int = 1, isa: str = NATIVE, **peers: PeerResult) -> ModelResult:
    return ModelResult(model, 224, 1, threads, peers, isa)


def limited_row() -> ModelResult:
    return row(
        isa=AVX2,
        onnxruntime=result(2.0, isa=UNRESTRICTED),
        openvino=result(4.0, isa=PARTLY_AVX2),
        xnnpack=result(6.0, isa=AVX2),
        sepc=result(3.0, isa=AVX2),
    )


def rendered(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_runner_gets_every_round(job: Job) -> None:
    order: list[str] = []

    def counting(name: str) -> Runner:
        def run() -> object:
            order.append(name)
            return job.model(*job.inputs)

        return Runner(run, lambda output: [torch.as_tensor(output)])

    builders = {name: lambda _job, name=name: counting(name) for name in ("a", "b")}
    results = measure(job, ["a", "b"], 3, builders, SHORT_S)
    assert all(len(peer.rounds_ms) == 3 and peer.is_right for peer in results.values())
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert turns == ["a", "b"] * 3


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


def test_wrong_output_is_marked(job: Job) -> None:
    builders = {
        "eager": BUILDERS["eager"],
        "off": lambda job: altered(job, 0.1),
        "nan": lambda job: altered(job, math.nan),
    }
    results = measure(job, list(builders), 1, builders, SHORT_S)
    assert results["eager"].is_right
    assert results["eager"].error == 0.0
    assert not results["off"].is_right
    assert results["off"].error > 1e-2
    assert not results["nan"].is_right
    assert not math.isnan(results["nan"].median_ms)


def test_error_once_seen_is_kept(job: Job) -> None:
    changes = iter([math.nan] * 5 + [0.0] * 100)
    wrong_at_first = Runner(lambda: job.model(*job.inputs) + next(changes), lambda y: [torch.as_tensor(y)])
    results = measure(job, ["x"], 3, {"x": lambda _job: wrong_at_first}, 0.0)
    assert math.isnan(results["x"].error)


def test_failing_builder_and_failing_run_cost_only_their_own_column(job: Job) -> None:
    def unbuildable(_job: Job) -> Runner:
        raise RuntimeError("no such operator\nlong story")

    def unrunnable(_job: Job) -> Runner:
        return Runner(lambda: 1 / 0, lambda _output: [])

    builders = {"a": unbuildable, "b": unrunnable, "eager": BUILDERS["eager"]}
    results = measure(job, list(builders), 2, builders, SHORT_S)
    assert results["a"].failure == "RuntimeError: no such operator"
    assert results["b"].failure.startswith("ZeroDivisionError")
    assert results["eager"].is_right
    assert json.loads(json.dumps(results["a"].to_json(), allow_nan=False))["median_ms"] is None


def test_relative_error_is_by_the_largest_reference_value() -> None:
    reference = [torch.tensor([1.0, -10.0]), torch.tensor([1.0])]
    assert relative_error([torch.tensor([1.1, -10.0]), torch.tensor([1.0])], reference) == pytest.approx(0.01, rel=1e-4)
    assert math.isnan(relative_error([torch.tensor([1.0, -10.0]), torch.tensor([math.nan])], reference))


def test_relative_error_needs_the_same_shapes() -> None:
    with pytest.raises(ValueError, match="expected"):
        relative_error([torch.zeros(2)], [torch.zeros(3)])


def test_describe_is_one_short_line() -> None:
    assert describe(ValueError("")) == "ValueError"
    assert len(describe(ValueError("x" * 500))) == 200


def test_ratios_ignore_wrong_and_failed_results() -> None:
    rows = [
        row("one", eager=result(4.0), openvino=result(2.0), sepc=result(1.0)),
        row("two", eager=result(9.0), openvino=result(2.0, error=1.0), sepc=result(1.0)),
        row("three", eager=result(9.0), openvino=result(2.0), sepc=result(1.0, failure="crashed")),
    ]
    assert [report.ratio(each, "eager") for each in rows[:2]] == [4.0, 9.0]
    assert math.isnan(report.ratio(rows[1], "openvino"))
    assert math.isnan(report.ratio(rows[2], "eager"))
    assert [report.best_peer_ratio(each) for each in rows[:2]] == [2.0, 9.0]
    assert report.geometric_mean([4.0, 9.0, math.nan]) == pytest.approx(6.0)
    assert math.isnan(report.geometric_mean([]))
    text = rendered(report.ratio_table(rows, "ratios"))
    assert "geometric mean" in text
    assert "6.00" in text
    assert "4.24" in text


def test_latency_table_marks_what_is_wrong_or_failed() -> None:
    rows = [row(eager=result(4.0), inductor=result(3.0, error=1.0), sepc=result(1.0, failure="crashed"))]
    text = rendered(report.latency_table(rows, "latency"))
    assert "4.00" in text
    assert "3.00 wrong" in text
    assert "failed" in text


def test_what_escapes_a_limit_is_marked_and_is_not_the_best() -> None:
    limited = limited_row()
    table = rendered(report.latency_table([limited], "latency"))
    assert "2.00 (unrestricted)" in table
    assert "4.00 (partly avx2)" in table
    assert "(avx2)" not in table
    assert report.best_peer_ratio(limited) == pytest.approx(4 / 3)
    assert "not counted as best peer, since unrestricted: onnxruntime" in rendered(report.ratio_table([limited], "x"))
    assert "onnxruntime 2.00 ms (unrestricted)" in compare.summary(limited)
    console = Console(file=io.StringIO(), width=200)
    report.print_tables(console, [limited])
    assert isinstance(console.file, io.StringIO)
    assert "1 thread, limited to avx2" in console.file.getvalue()


def test_without_a_limit_nothing_is_marked() -> None:
    free = row(onnxruntime=result(2.0), sepc=result(3.0))
    assert "(" not in rendered(report.latency_table([free], "latency")) + compare.summary(free)
    assert "unrestricted" not in rendered(report.ratio_table([free], "ratios"))


def test_failures_are_explained_below_the_tables() -> None:
    console = Console(file=io.StringIO(), width=200)
    report.print_tables(console, [row(eager=result(4.0), sepc=result(1.0, failure="crashed [sic]"))])
    assert isinstance(console.file, io.StringIO)
    assert "net, 1 thread(s): sepc failed: crashed [sic]" in console.file.getvalue()


@pytest.mark.parametrize("own", [result(1.0), result(1.0, failure="crashed")])
def test_files_are_written(tmp_path: Path, own: PeerResult) -> None:
    rows = [row("a", threads, eager=result(4.0), openvino=result(2.0), sepc=own) for threads in (1, 2)]
    report.write_json(tmp_path / "x" / "r.json", rows, "the command", {"rounds": 3})
    document = json.loads((tmp_path / "x" / "r.json").read_text())
    assert document["command"] == "the command"
    assert document["machine"]["processor"]
    assert document["versions"]["torch"]
    assert document["results"][0]["peers"]["eager"]["median_ms"] == 4.0
    report.write_chart(tmp_path / "r.svg", rows)
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_command_line() -> None:
    options = compare.parse(["resnet50", "--threads", "1", "2", "--peers", "eager,sepc"])
    assert (options.models, options.threads, options.peers) == (["resnet50"], [1, 2], ["eager", "sepc"])
    assert (options.size, options.isa) == (None, NATIVE)
    options = compare.parse(["resnet50", "--isa", "avx2", "--batch", "16", "--size", "1024"])
    assert (options.isa, options.batch, options.size) == (AVX2, 16, 1024)


@pytest.mark.parametrize(
    "arguments", [["m", "--peers", "tensorrt"], ["m", "--threads", "0"], ["m", "--isa", "sse"], []]
)
def test_bad_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse(arguments)
    assert "error:" in capsys.readouterr().err


def test_main_reports_sepc_by_its_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"good": result(1.0), "bad": result(1.0, error=1.0)}
    monkeypatch.setattr(compare, "run_in_process", lambda model, threads, _o: row(model, threads, sepc=own[model]))
    files = ["--output", str(tmp_path), "--name", "r"]
    assert compare.main(["good", *files]) == 0
    assert compare.main(["good", "bad", *files]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.svg"}


def test_unknown_model_fails_in_its_own_process(tmp_path: Path) -> None:
    options = compare.parse(["no_such_model", "--peers", "eager", "--output", str(tmp_path)])
    failed = compare.run_in_process("no_such_model", 1, options)
    assert "no_such_model" in failed.peers["eager"].failure


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


def test_limit_is_in_force_in_the_process_that_measures() -> None:
    options = compare.parse("m --isa avx2 --peers eager --size 32 --rounds 1".split())
    measured = compare.run_in_process("mobilenetv3_small_050", 1, options)
    # What PyTorch says of itself, not what was asked for.
    assert (measured.isa, measured.peers["eager"].isa, measured.peers["eager"].failure) == (AVX2, AVX2, "")
    assert json.loads(json.dumps(measured.to_json()))["peers"]["eager"]["isa"] == AVX2


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
