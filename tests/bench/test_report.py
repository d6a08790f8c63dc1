"""What is told of measurements: tables, files, a chart."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from sepc.bench import report
from sepc.bench.measure import PeerResult
from tests.bench.results import limited_row, rendered, result, row


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
    assert "onnxruntime 2.00 ms (unrestricted)" in report.summary(limited)
    console = Console(file=io.StringIO(), width=200)
    report.print_tables(console, [limited])
    assert isinstance(console.file, io.StringIO)
    assert "1 thread, limited to avx2" in console.file.getvalue()


def test_without_a_limit_nothing_is_marked() -> None:
    free = row(onnxruntime=result(2.0), sepc=result(3.0))
    assert "(" not in rendered(report.latency_table([free], "latency")) + report.summary(free)
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
