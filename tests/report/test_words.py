"""Numbers, types and names as reports write them."""

from __future__ import annotations

import pytest
import torch

from sepc.report.words import bytes_text, flops_text, op_name, percent, shape_text, short_op, short_sources, time_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(1, 32, 7, 7), "1×32×7×7"),
        (torch.empty(2, dtype=torch.int64), "2 int64"),
        (torch.empty(()), "scalar"),
        ((torch.empty(1),), ""),
        (None, ""),
    ],
)
def test_shape_text(value: object, text: str) -> None:
    assert shape_text(value) == text


def test_units() -> None:
    assert [bytes_text(count) for count in (12, 1500, 2_340_000)] == ["12 B", "1.5 kB", "2.34 MB"]
    assert [flops_text(count) for count in (12, 1500, 2_340_000, 5e9)] == ["12", "1.5 k", "2.34 M", "5 G"]
    assert [time_text(time_us) for time_us in (0.25, 999.96, 1234.0)] == ["0.2 µs", "1000.0 µs", "1.23 ms"]
    assert percent(1, 8) == "12.5 %"
    assert percent(0, 0) == "–"


def test_names() -> None:
    assert op_name(torch.ops.aten.conv2d.default) == "conv2d"
    assert op_name(len) == "len"
    assert [short_op(op) for op in ("conv2d", "conv2d.default", "aten.conv2d.default")] == ["conv2d"] * 3
    assert short_sources(["/a/b/net.py:3", "/a/b/net.py:5", "c.py:1"]) == "b/net.py:3, 5; c.py:1"
