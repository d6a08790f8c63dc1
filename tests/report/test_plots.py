"""Pictures of costs: what is drawn, in which formats, and what is said where matplotlib is missing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import sepc
from sepc.cost_model.roofline import Roofline
from sepc.report import plots
from sepc.report.cost_plots import draw_efficiency_gap, draw_memory, draw_waterline
from sepc.report.palette import COLOURS
from sepc.report.plots import MatplotlibMissingError, PlotKind, inline_svg

KINDS = get_args(PlotKind)


def drawn(kind: str, explanation: sepc.Explanation) -> Axes:
    axes: Axes = Figure().subplots()
    {"efficiency-gap": draw_efficiency_gap, "waterline": draw_waterline, "memory": draw_memory}[kind](axes, explanation)
    return axes


def made_up(explanation: sepc.Explanation) -> sepc.Explanation:
    """Two regions with round figures: one bound by arithmetic, one by memory."""
    one = next(one for one in explanation.regions if one.kernel == "sepc")
    roofline = Roofline(100.0, {"L2": 50.0, "DRAM": 10.0})
    first = replace(one, name="first", flops=2_000_000, predicted_us=40.0, bottleneck="compute")
    first = replace(first, bytes_per_level={"L2": 400_000.0, "DRAM": 0.0})
    second = replace(one, name="second", flops=1_000_000, predicted_us=110.0, bottleneck="DRAM")
    second = replace(second, bytes_per_level={"L2": 100_000.0, "DRAM": 1_000_000.0})
    return replace(explanation, roofline=roofline, regions=(first, second))


def points(axes: Axes, marker: str) -> list[tuple[float, float]]:
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if line.get_marker() == marker
    ]


def test_the_gap_is_time_against_that_of_the_multiply_adds_at_the_peak(explanation: sepc.Explanation) -> None:
    found = made_up(explanation)
    axes = drawn("efficiency-gap", found)
    assert points(axes, "o") == [(20.0, 40.0), (10.0, 110.0)]
    assert not points(axes, "x")
    assert axes.get_title() == "The whole model reaches by prediction 20% of the peak"
    assert axes.get_xscale() == axes.get_yscale() == "log"
    texts = [one.get_text() for one in axes.texts]
    assert texts.index("second") < texts.index("first")
    measured = replace(found, regions=tuple(replace(one, measured_us=300.0) for one in found.regions))
    axes = drawn("efficiency-gap", measured)
    assert points(axes, "x") == [(20.0, 300.0), (10.0, 300.0)]
    assert "as measured 5%" in axes.get_title()


def test_the_waterline_is_that_of_the_slowest_level_and_bars_are_as_wide_as_the_bound(
    explanation: sepc.Explanation,
) -> None:
    axes = drawn("waterline", made_up(explanation))
    bars = [one for one in axes.patches if isinstance(one, Rectangle)]
    # 2 MFLOP at 100 GFLOP/s take 20 µs; 1 MB at 10 GB/s takes 100 µs, ten times as long as its 1 MFLOP.
    assert [one.get_width() for one in bars] == pytest.approx([20.0, 100.0])
    assert [one.get_y() + one.get_height() for one in bars] == pytest.approx([5.0, 1.0])
    (water, line) = [one for one in axes.patches if not isinstance(one, Rectangle)]
    assert list(line.get_data().values) == pytest.approx([2.0, 10.0])
    assert list(water.get_data().edges) == pytest.approx([0.0, 20.0, 120.0])
    assert axes.get_title() == "Bytes leave 25% of the peak within reach"
    assert [one.get_facecolor()[:3] for one in bars] != [bars[0].get_facecolor()[:3]] * 2


def test_memory_shows_every_storage_where_and_as_long_as_it_lies(explanation: sepc.Explanation) -> None:
    axes = drawn("memory", explanation)
    boxes = [one for one in axes.patches if isinstance(one, Rectangle)]
    assert len(boxes) == len(explanation.storages) > 2
    for one, box in zip(explanation.storages, boxes, strict=True):
        assert box.get_xy() == pytest.approx((one.first - 0.5, one.offset_bytes / 1e3))
        assert (box.get_width(), box.get_height()) == pytest.approx((one.last - one.first + 1, one.size_bytes / 1e3))
    assert {one.is_scratch for one in explanation.storages} == {True, False}


def test_storages_that_are_alive_together_do_not_overlap_and_fit_the_arena(explanation: sepc.Explanation) -> None:
    storages = explanation.storages
    for index, one in enumerate(storages):
        assert one.offset_bytes + one.size_bytes <= explanation.arena_bytes
        assert 0 <= one.first <= one.last < len(explanation.regions)
        for other in storages[:index]:
            together = one.first <= other.last and other.first <= one.last
            apart = (
                one.offset_bytes + one.size_bytes <= other.offset_bytes
                or other.offset_bytes + other.size_bytes <= one.offset_bytes
            )
            assert apart or not together


def test_what_there_is_nothing_to_draw_of_is_said(explanation: sepc.Explanation) -> None:
    nothing = replace(explanation, regions=(), storages=())
    assert drawn("efficiency-gap", nothing).texts[0].get_text().startswith("No region has")
    assert drawn("waterline", nothing).texts[0].get_text().startswith("Bytes per memory level")
    assert not [one for one in drawn("memory", nothing).patches if isinstance(one, Rectangle)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_written_in_each_format_and_equal_pictures_are_equal_files(
    explanation: sepc.Explanation, tmp_path: Path, kind: PlotKind
) -> None:
    svg = explanation.plot(tmp_path / "deep" / "one.svg", kind)
    assert svg == tmp_path / "deep" / "one.svg"
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert explanation.plot(tmp_path / "two.svg", kind).read_bytes() == svg.read_bytes()
    assert explanation.plot(tmp_path / "one.png", kind).read_bytes().startswith(b"\x89PNG")
    assert explanation.plot(tmp_path / "one.pdf", kind).read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_a_page_takes_its_text_colour_and_names_of_its_own(
    explanation: sepc.Explanation, kind: PlotKind
) -> None:
    text = inline_svg(explanation, kind)
    assert text.startswith("<svg ")
    assert "currentColor" in text
    assert plots._INK not in text
    assert "xmlns" not in text
    root = ElementTree.fromstring(text)
    names = {one.get("id") for one in root.iter() if one.get("id")}
    assert names
    assert all(str(name).startswith(f"{kind}-") for name in names)
    used = {value[1:] for one in root.iter() for name, value in one.items() if name == "href"}
    used |= {one.get("clip-path", "")[5:-1] for one in root.iter() if one.get("clip-path")}
    assert used <= names


def test_what_is_wrong_is_one_clear_error(
    explanation: sepc.Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(sepc.InputError, match=r"no picture 'waterlines'[\s\S]*waterline"):
        plots.plot(explanation, tmp_path / "one.svg", "waterlines")
    with pytest.raises(sepc.InputError, match=r"no format 'gif'[\s\S]*svg, png, pdf"):
        explanation.plot(tmp_path / "one.gif", "waterline")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MatplotlibMissingError, match="pip install matplotlib"):
        explanation.plot(tmp_path / "one.svg", "waterline")
    assert not list(tmp_path.iterdir())


def test_colours_can_be_told_apart() -> None:
    assert len({one.tint for one in COLOURS.values()}) == len({one.strong for one in COLOURS.values()}) == len(COLOURS)
