"""What the cost pictures show, drawn on axes of matplotlib.

*Efficiency gap* and *waterline* after Lavin, 'On the Efficiency of Convolutional Neural Networks' (arXiv 2404.03617).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from sepc.report.palette import colour_of
from sepc.report.words import bytes_text, time_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from sepc.report.explanation import Explanation, RegionExplanation

WATER: Final = "#0072B2"
IN_USE: Final = "#D55E00"
TITLE_PAD: Final = 26
"""Points between axes and title, where the legend is."""
EFFICIENCIES: Final = (1.0, 0.5, 0.25, 0.1)
"""Shares of the peak that lines are drawn for."""
LABELLED: Final = 4
"""How many regions are named: those that are the furthest from their ideal, in time."""


def draw_efficiency_gap(axes: Axes, explanation: Explanation) -> None:
    """Each region's predicted, and measured, time against the time of its multiply-adds at the peak."""
    regions = [one for one in explanation.regions if one.flops and (one.predicted_us or one.measured_us)]
    ideal_us = [explanation.roofline.compute_us(one.flops) for one in regions]
    for ideal, one in zip(ideal_us, regions, strict=True):
        colour = colour_of(one.bottleneck or one.kernel).strong
        both = [time for time in (one.predicted_us, one.measured_us) if time]
        axes.plot([ideal] * len(both), both, color=colour, linewidth=1, alpha=0.6, zorder=2)
        if one.predicted_us:
            axes.plot(ideal, one.predicted_us, "o", color=colour, markersize=6, zorder=3)
        if one.measured_us:
            axes.plot(ideal, one.measured_us, "x", color=colour, markersize=6, markeredgewidth=1.6, zorder=4)
    if not regions:
        _say(axes, "No region has multiply-adds and a time.")
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = min(ideal_us) / 1.6, max(ideal_us) * 1.6
    for share in EFFICIENCIES:
        axes.plot(
            [low, high],
            [low / share, high / share],
            linestyle="-" if share == 1 else ":",
            linewidth=1,
            color=_ink(axes),
        )
        axes.annotate(
            f"{share:.0%}", (high, high / share), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(low, high)
    _name_the_furthest(axes, ideal_us, regions)
    axes.set_xlabel(f"ideal: its multiply-adds at {explanation.roofline.peak_gflops:.0f} GFLOP/s, µs")
    axes.set_ylabel("time, µs")
    _legend(axes, regions, measured=explanation.measured_us is not None)
    axes.set_title(_efficiency(explanation, sum(ideal_us)), fontsize=10, pad=TITLE_PAD)
    axes.grid(alpha=0.2, which="both")


def _name_the_furthest(axes: Axes, ideal_us: Sequence[float], regions: Sequence[RegionExplanation]) -> None:
    """Write their names beside the regions that lose the most time, where there is room."""
    taken: list[tuple[float, float]] = []
    for ideal, one in sorted(zip(ideal_us, regions, strict=True), key=lambda pair: pair[0] - _time_us(pair[1])):
        place = math.log10(ideal), math.log10(_time_us(one))
        if len(taken) < LABELLED and all(abs(place[0] - x) > 0.5 or abs(place[1] - y) > 0.15 for x, y in taken):
            taken.append(place)
            axes.annotate(
                one.name,
                (ideal, _time_us(one)),
                xytext=(-7, 4),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )


def _efficiency(explanation: Explanation, ideal_us: float) -> str:
    """The share of the peak of the whole model, in words."""
    parts = [f"by prediction {ideal_us / explanation.total.predicted_us:.0%}"] if explanation.total.predicted_us else []
    parts += [f"as measured {ideal_us / explanation.measured_us:.0%}"] if explanation.measured_us else []
    return f"The whole model reaches {' and '.join(parts) or 'an unknown share'} of the peak"


def draw_waterline(axes: Axes, explanation: Explanation) -> None:
    """Operations per byte of kernel after kernel, and how many the machine needs.

    Bytes are those of the level that takes the longest for them, by prediction. Where a bar is under water, its bytes
    take longer than its arithmetic at the peak. Each is as wide as the longer of the two.
    """
    roofline = explanation.roofline
    regions = [one for one in explanation.regions if one.flops and roofline.slowest_level(one.bytes_per_level)]
    if not regions:
        _say(axes, "Bytes per memory level are not predicted for any region.")
        return
    ideal_us = [roofline.compute_us(one.flops) for one in regions]
    levels = [roofline.slowest_level(one.bytes_per_level) for one in regions]
    waterlines = [roofline.waterline(level) for level in levels]
    intensities = [one.flops / one.bytes_per_level[level] for one, level in zip(regions, levels, strict=True)]
    bound_us = [
        ideal * max(1.0, water / intensity)
        for ideal, water, intensity in zip(ideal_us, waterlines, intensities, strict=True)
    ]
    edges = [0.0, *accumulate(bound_us)]
    floor = min(*intensities, *waterlines) / 2
    axes.bar(
        edges[:-1],
        [intensity - floor for intensity in intensities],
        bound_us,
        bottom=floor,
        align="edge",
        color=[colour_of(one.bottleneck).strong for one in regions],
        edgecolor=_ink(axes),
        linewidth=0.4,
    )
    axes.stairs(waterlines, edges, baseline=floor, fill=True, color="#56B4E9", alpha=0.4, zorder=3)
    axes.stairs(waterlines, edges, baseline=None, color=WATER, linewidth=1.6, zorder=4)
    axes.set_yscale("log")
    axes.set_ylim(floor, max(*intensities, *waterlines) * 1.5)
    axes.set_xlim(0, edges[-1])
    share = sum(ideal_us) / edges[-1]
    axes.set_title(f"Bytes leave {share:.0%} of the peak within reach", fontsize=10, pad=TITLE_PAD)
    axes.set_xlabel("kernels in order, each as wide as it takes at the least, µs")
    axes.set_ylabel("FLOP per byte of its slowest memory level")
    axes.grid(alpha=0.2, axis="y")
    _legend(axes, regions, waterline=True)


def draw_memory(axes: Axes, explanation: Explanation) -> None:
    """What lies where in the arena while each kernel runs."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    ink, kilobytes = _ink(axes), 1e3
    for index, one in enumerate(explanation.storages):
        corner = (one.first - 0.5, one.offset_bytes / kilobytes)
        size = (one.last - one.first + 1, one.size_bytes / kilobytes)
        shade, hatch = ("none", "///") if one.is_scratch else (_SHADES[index % len(_SHADES)], None)
        axes.add_patch(Rectangle(corner, *size, edgecolor=ink, linewidth=0.5, facecolor=shade, hatch=hatch))
    count = max(1, len(explanation.regions))
    in_use = [
        sum(one.size_bytes for one in explanation.storages if one.first <= index <= one.last) / kilobytes
        for index in range(count)
    ]
    edges = [index - 0.5 for index in range(count + 1)]
    axes.stairs(in_use, edges, baseline=None, color=IN_USE, linewidth=1.6, zorder=4)
    axes.axhline(explanation.arena_bytes / kilobytes, color=ink, linestyle="--", linewidth=1.2)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(0, max(explanation.arena_bytes / kilobytes, *in_use) * 1.06 or 1)
    axes.set_xlabel("number of the kernel")
    axes.set_ylabel("offset in the arena, kB")
    arena, apart = bytes_text(explanation.arena_bytes), bytes_text(explanation.unshared_bytes)
    title = f"An arena of {arena} holds all values, which would take {apart} apart, and scratch"
    axes.set_title(title, fontsize=10, pad=TITLE_PAD)
    _place(
        axes,
        [
            Patch(facecolor=_SHADES[0], edgecolor=ink, label="a value, from its first write to its last use"),
            Patch(facecolor="none", edgecolor=ink, hatch="///", label="scratch"),
            Line2D([], [], color=IN_USE, label="bytes in use"),
            Line2D([], [], color=ink, linestyle="--", label="arena"),
        ],
    )


_SHADES: Final = ("#9CCBE8", "#BFE8DA", "#F3D6E4", "#FADFB0", "#D9E3F2", "#F6F0B4")


def _legend(
    axes: Axes, regions: Sequence[RegionExplanation], *, measured: bool = False, waterline: bool = False
) -> None:
    """What colours and marks mean, of those that occur."""
    from matplotlib.lines import Line2D

    names = dict.fromkeys(one.bottleneck or one.kernel for one in regions)
    handles = [
        Line2D([], [], marker="s", linestyle="", color=colour_of(name).strong, label=colour_of(name).words)
        for name in names
    ]
    if measured:
        ink = _ink(axes)
        handles.append(Line2D([], [], marker="o", linestyle="", color=ink, label="predicted"))
        handles.append(Line2D([], [], marker="x", linestyle="", color=ink, label="measured"))
    if waterline:
        handles.append(Line2D([], [], color=WATER, label="waterline: what arithmetic at the peak needs"))
    _place(axes, handles)


def _place(axes: Axes, handles: Sequence[Artist]) -> None:
    """Put a legend between the axes and their title."""
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        borderaxespad=0.2,
        ncols=len(handles),
        columnspacing=1.4,
        fontsize=8,
        frameon=False,
    )


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center")
    axes.set_axis_off()


def _ink(axes: Axes) -> str:
    """The colour of text and axes."""
    return str(axes.xaxis.label.get_color())


def _time_us(one: RegionExplanation) -> float:
    return one.measured_us or one.predicted_us


def caption(explanation: Explanation, kind: str) -> str:
    """What a picture shows, in a sentence or two."""
    match kind:
        case "efficiency-gap":
            return (
                "Each region's time against the time that its multiply-adds would take at the machine's peak. "
                "The further above the solid line, the more there is to gain."
            )
        case "waterline":
            return (
                "Operations per byte, kernel after kernel. Where a bar ends under water, bytes take longer than "
                "arithmetic at the peak, and only fewer bytes, by fusion or tiling, can help."
            )
        case _:
            total = time_text(explanation.measured_us or explanation.total.predicted_us)
            return f"What lies where in the arena during the {len(explanation.regions)} kernels, which take {total}."
