"""The check of the cost model: its figures from fake measurements, and that every part can run."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.cost_model import __main__ as command
from benchmarks.cost_model import bytes as bytes_part
from benchmarks.cost_model import cachegrind, choice, fusion, gpu, memory
from benchmarks.cost_model.kernels import Bench, Launch, harness_source, lower_region
from benchmarks.cost_model.proxylessnas import InvertedResidual, proxylessnas
from benchmarks.cost_model.regions import captured, extract_piece, merge_all, own_regions, run_passes
from benchmarks.cost_model.results import Report, median_and_p90
from sepc.backends.arguments import Result, Scratch
from sepc.backends.regions import LoweredKernel
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_planner import GpuPlanner
from sepc.cost_model.latency import Cost
from sepc.cost_model.tiling import RowTiling
from sepc.cost_model.work import Work
from sepc.ir.convolution import Convolution
from sepc.passes.fuse import LONGEST
from sepc.target import Target

TARGET = Target.parse("x86-64-v3")
BLOCK = nn.Sequential(nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(32, 8, 1))


def grouped(model: nn.Module, channels: int = 8) -> torch.fx.GraphModule:
    x = torch.randn(1, channels, 12, 12).contiguous(memory_format=torch.channels_last)
    graph_module = captured(model, (x,))
    run_passes(graph_module, TARGET, 1, "canonicalize", "plan-layout", without=("fuse", "gather-means"))
    return graph_module


def pair(predicted: float, read: float, written: float) -> bytes_part.Pair:
    cost = Cost(1, 1.0, (("L2", 7.0), ("DRAM", predicted)), 1.0, 1.0, "DRAM")
    return bytes_part.Pair(bytes_part.CASES[0], "tiling", cost, cachegrind.Traffic(9.0, 9.0, read, written))


def chain(single_us: float, chain_us: float, predicted_single_us: float = 2.0) -> fusion.Outcome:
    return fusion.Outcome("net", 224, 1, "pw, dw", predicted_single_us, 1.0, single_us, chain_us, agree=True)


def test_the_summary_of_cachegrind_is_read() -> None:
    text = "desc: D1\nevents: Ir DLmr DLmw\nfn=main\n3 1 2 3\nsummary: 100 7 5\n"
    assert cachegrind.parse_summary(text) == {"Ir": 100, "DLmr": 7, "DLmw": 5}
    with pytest.raises(ValueError, match="no summary"):
        cachegrind.parse_summary("events: Ir\n")


def test_traffic_is_what_the_second_call_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {
        1: dict.fromkeys(("D1mr", "D1mw", "DLmr", "DLmw"), 10),
        2: {"D1mr": 30, "D1mw": 20, "DLmr": 14, "DLmw": 11},
    }
    monkeypatch.setattr(cachegrind, "_misses", lambda program, caches, calls: counts[calls])
    traffic = cachegrind.measure(Path("program"), cachegrind.Caches(1, 1, 1, 1))
    assert traffic == cachegrind.Traffic(20 * 64, 10 * 64, 4 * 64, 1 * 64)
    assert traffic.last == 5 * 64


def test_the_simulated_program_gives_every_argument_its_place() -> None:
    kernel = LoweredKernel("k", None, (0, np.zeros(20, np.float32), Result(), Scratch(64)))
    source = cachegrind.program_source(kernel, (100,), 50)
    assert "k(memory + 0, memory + 320, memory + 640, memory + 896, 0, 1);" in source
    assert "memory[1152]" in source
    assert "int32_t k(void*, void*, void*, void*, int32_t, int32_t);" in source


def test_bytes_are_compared_behind_the_last_cache() -> None:
    report = bytes_part.report_of([pair(110, 60, 40), pair(100, 100, 0), pair(100, 50, 150)])
    assert [row[4] for row in report.rows] == [pytest.approx(10.0), 0.0, pytest.approx(50.0)]
    assert "3 pairs, relative error median 10.0%" in report.summary[0]


def test_there_are_enough_pairs_of_every_kind() -> None:
    assert len(bytes_part.CASES) * bytes_part.TILINGS_PER_REGION >= 30
    assert sum(case.chain for case in bytes_part.CASES) >= 4
    machine = bytes_part.machine_with(1 << 18, TARGET.machine)
    assert [level.size_bytes for level in machine.levels] == [1 << 15, 1 << 18, 0]


@pytest.mark.parametrize("case", [bytes_part.CASES[0], bytes_part.CASES[18]], ids=lambda case: case.name)
def test_a_case_becomes_the_region_it_describes(case: bytes_part.Case) -> None:
    found = bytes_part.region_of(case, TARGET)
    assert found.kind == ("chain" if case.chain else "convolution")
    assert found.input_elements == (case.channels * case.size**2,)
    assert found.predict(found.chosen.tiling, TARGET.machine, 1) == found.chosen.cost


def test_regret_and_shares() -> None:
    one = choice.Outcome("net", "r", "chain", "pw", 51, 9.0, 11.0, 10.0, RowTiling(1), RowTiling(2), 0)
    assert one.regret == pytest.approx(0.1)
    report = choice.report_of([one, replace(one, chosen_us=10.0, tilings=49)], 1)
    assert "2 regions of 1 models: regret median 5.0%" in report.summary[0]
    assert "the 1 that have 50 tilings or more: median 10.0%" in report.summary[1]
    assert median_and_p90([0.0, 1.0]) == (0.5, 0.9)


def test_only_decisions_that_matter_count() -> None:
    outcomes = [chain(2.0, 1.0), chain(1.0, 2.0), chain(1.0, 1.05), chain(1.0, 2.0, predicted_single_us=0.5)]
    assert [one.matters for one in outcomes] == [True, True, False, True]
    assert [one.is_right for one in outcomes] == [True, False, False, True]
    assert "4 chains, 3 of them" in fusion.report_of(outcomes, 1).summary[0]
    assert "in 2 of these: 66.7%" in fusion.report_of(outcomes, 1).summary[0]
    assert "none" in fusion.report_of([chain(1.0, 1.0)], 1).summary[0]


def test_chains_are_all_runs_of_neighbours_as_long_as_allowed() -> None:
    chains = list(fusion.chains_of(grouped(BLOCK)))
    assert sorted(map(len, chains)) == [2, 2, 3]
    five = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Conv2d(8, 8, 1), nn.ReLU())))
    assert max(len(run) for run in fusion.chains_of(grouped(five))) == LONGEST["time"] == 4


class Normalized(nn.Module):
    """Depthwise, layer norm over channels, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return result


def test_a_piece_with_a_permute_is_measured() -> None:
    graph_module = grouped(Normalized())
    piece = extract_piece(graph_module, max(fusion.chains_of(graph_module), key=len))
    outcome = fusion.compare("net", 12, 1, piece, TARGET, 1)
    assert outcome.agree
    assert outcome.stages == "dw3 8→8 @12×12, norm 8→8 @12×12, pw 8→20 @12×12"


def test_a_piece_is_measured_as_chain_and_as_single_kernels() -> None:
    graph_module = grouped(BLOCK)
    piece = extract_piece(graph_module, max(fusion.chains_of(graph_module), key=len))
    outcome = fusion.compare("net", 12, 1, piece, TARGET, 2)
    assert outcome.agree
    assert min(outcome.single_us, outcome.chain_us, outcome.predicted_single_us, outcome.predicted_chain_us) > 0
    assert outcome.stages == "pw 8→32 @12×12, dw3 32→32 @12×12, pw 32→8 @12×12"


def test_tilings_of_a_chain_differ_and_are_timed_in_turn() -> None:
    graph_module = grouped(BLOCK)
    merge_all(graph_module)
    run_passes(graph_module, TARGET, 1, "plan-layout", "choose-tiling")
    (found,) = own_regions(graph_module, ("chain",))
    tilings = [found.chosen.tiling, *found.alternatives(TARGET.machine, 1, 4, random.Random(0))]
    assert len(set(tilings)) == 5
    launches = [[Launch(lower_region(found, tiling, TARGET.vector_lanes), (0,), 1)] for tiling in tilings]
    bench = Bench(launches, [*found.input_elements, found.result_elements], 1, TARGET, 1)
    assert bench.disagreeing(range(5), 1) == []
    assert all(time_us > 0 for time_us in bench.times_us(range(5), 2).values())
    bench.blocks[0][:] = np.nan
    assert bench.disagreeing(range(5), 1) == []
    assert np.isnan(bench.blocks[1]).any()


def test_the_harness_runs_the_kernels_of_a_variant_one_after_the_other() -> None:
    source = harness_source([["a"], ["a", "b"]], [[[0, 1]], [[0, 1], [1, 2, 3]]])
    assert "int32_t b(void*, void*, void*, int32_t, int32_t);" in source
    assert source.index("  a(b[0], b[1], t, n);") < source.index("  b(b[1], b[2], b[3], t, n);")
    assert "{variant_0, variant_1}" in source


def test_memory_is_reported_per_size_or_skipped() -> None:
    report = memory.report_of([memory.Arenas(224, 300, 200, 90), memory.Arenas(1024, 300, 200, 0)], 1)
    assert "30.0% of the unfused plan" in report.summary[0]
    assert "skipped" in report.summary[1]


def inverted_residual(size: int, channels: int, inner: int) -> tuple[Work, ...]:
    expand = Convolution(1, size, size, size, size, channels, inner)
    depthwise = Convolution(1, size, size, size, size, inner, inner, inner, (3, 3), (1, 1), (1, 1))
    project = Convolution(1, size, size, size, size, inner, channels)
    return Work(expand, 2), Work(depthwise, 2), Work(project)


def test_fusing_saves_bytes_of_a_gpu_where_it_is_quicker_and_nothing_where_it_is_not() -> None:
    planner = GpuPlanner(GpuMachine.load("sm_75_gtx_1660"))
    large, small = inverted_residual(56, 24, 144), inverted_residual(7, 160, 960)
    saves = gpu.plan(large, "a GPU", "net", planner)
    assert saves is not None
    assert saves.fused is not None
    compulsory = 4 * 56 * 56 * 2 * 24
    assert compulsory < saves.fused.global_bytes < saves.apart.global_bytes / 2
    assert saves.kernels == 1
    assert saves.planned == saves.fused
    apart = gpu.plan(small, "a GPU", "net", planner)
    assert apart is not None
    assert apart.fused is not None
    assert apart.fused.time_us > apart.planned.time_us
    pair = gpu.plan(large[:2], "a GPU", "net", planner)
    assert pair is not None
    text = gpu.report_of([pair, saves, apart]).text()
    assert compulsory < saves.least_bytes <= saves.fused.least_bytes < saves.apart.least_bytes
    assert 0 < saves.saving_by_bytes < 1
    assert "1 of 2 whole inverted residuals become one kernel" in text
    assert "a GPU: 1 of 1 pairs become one kernel" in text
    assert "pw 24→144 @56, dw3 144→144 @56, pw 144→24 @56" in text


def test_layers_without_a_kernel_of_blocks_are_no_group() -> None:
    planner = GpuPlanner(GpuMachine.load("sm_86"))
    expand, depthwise, _ = inverted_residual(56, 24, 144)
    assert gpu.plan((replace(expand, packed=False), depthwise), "a GPU", "net", planner) is None


def test_pairs_and_inverted_residuals_are_found_once_each() -> None:
    block = inverted_residual(28, 32, 192)
    found = list(gpu.groups_in([block, (*block, *block)]))
    assert found == [block[:2], block, block[1:]]


def test_proxylessnas_is_that_of_the_paper() -> None:
    model, (image,) = proxylessnas()
    blocks = [one for one in model.modules() if isinstance(one, InvertedResidual)]
    assert len(blocks) == 20
    assert model(image).shape == (1, 1000)
    # 4.08 million, as its authors state of their model.
    assert sum(one.numel() for one in model.parameters()) == pytest.approx(4.08e6, rel=0.001)


def test_reports_are_printed_and_written(tmp_path: Path) -> None:
    report = Report("part", "A title", ["what", "µs"], [["a", 1.234567], ["b", 12345.6]], ["The line"])
    assert "a      1.23" in report.text()
    assert "12346" in report.text()
    paths = report.write(tmp_path / "new")
    assert [path.name for path in paths] == ["cost_model_part.txt", "cost_model_part.json"]
    document = json.loads(paths[1].read_text())
    assert document["rows"][0] == {"what": "a", "µs": 1.234567}
    assert document["summary"] == ["The line"]


def test_parts_are_run_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "run", lambda quick, threads: Report("memory", f"{quick} {threads}", ["a"]))
    assert command.main(["memory", "memory", "--quick", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("True 1") == 1
    monkeypatch.setattr(cachegrind, "is_installed", lambda: False)
    assert command.main(["bytes", "--output", str(tmp_path)]) == 1
    assert "valgrind is not installed" in capsys.readouterr().out
