"""What a comparison prints and leaves behind: tables for the terminal, JSON for programs, a bar chart for people."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sepc.bench.measure import TOLERANCE, ModelResult, PeerResult
from sepc.bench.peers import NATIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN = "sepc"
# Okabe and Ito's palette, which colour-blind readers can tell apart; ours stands out.
_COLOURS = {
    "eager": "#999999",
    "inductor": "#E69F00",
    "onnxruntime": "#56B4E9",
    "openvino": "#009E73",
    "xnnpack": "#CC79A7",
    "sepc": "#D55E00",
}
_PACKAGES = "torch timm torchvision onnx onnxscript onnxruntime openvino executorch torchao apache-tvm sepc".split()
_INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "asimd", "sve")


def print_tables(console: Console, results: Sequence[ModelResult]) -> None:
    """Print, for every number of threads, the medians, the ratios to sepc and the errors; then what failed and why."""
    for threads in sorted({result.threads for result in results}):
        rows = [result for result in results if result.threads == threads]
        conditions = _conditions(rows)
        console.print(latency_table(rows, f"Median latency in ms, {conditions}"))
        if any(_is_valid(row, OWN) for row in rows):
            console.print(ratio_table(rows, f"Latency relative to sepc (above 1: sepc is faster), {conditions}"))
        console.print(error_table(rows, f"max |y - eager| / max |eager|, {conditions}"))
    for result in results:
        for name, peer in result.peers.items():
            if peer.failure:
                line = f"{result.model}, {result.threads} thread(s): {name} failed: {peer.failure}"
                console.print(Text(line, style="red"), soft_wrap=True)


def _conditions(rows: Sequence[ModelResult]) -> str:
    """What the rows, which are of one number of threads, were measured under."""
    threads, limits = rows[0].threads, sorted({row.isa for row in rows} - {NATIVE})
    return ", ".join([f"{threads} thread{'s' if threads > 1 else ''}", *(f"limited to {isa}" for isa in limits)])


def mark(peer: PeerResult, isa: str) -> str:
    """What follows the figure of a runner that uses other instruction sets than it was limited to."""
    return "" if peer.failure or peer.isa == isa else f" ({peer.isa})"


def latency_table(rows: Sequence[ModelResult], title: str) -> Table:
    """Medians in milliseconds, the fastest of each model in bold; wrong and unrestricted ones are marked and do not
    compete, those that obey a limit on instruction sets in part are marked.
    """
    table = _table(title, ["inputs", *_peers(rows)])
    for row in rows:
        best_ms = min((peer.median_ms for peer in row.peers.values() if peer.competes), default=math.nan)
        cells = [_latency_cell(row.peers.get(name), row.isa, best_ms) for name in _peers(rows)]
        table.add_row(row.model, row.inputs or "–", *cells)
    return table


def _latency_cell(peer: PeerResult | None, isa: str, best_ms: float) -> Text:
    if peer is None:
        return Text("–")
    if peer.failure:
        return Text("failed", style="red")
    text = Text(f"{peer.median_ms:.2f}", style="bold" if peer.median_ms == best_ms else "")
    text.append(mark(peer, isa), style="yellow")
    return text if peer.is_right else text.append(" wrong", style="red")


def summary(result: ModelResult) -> str:
    """All medians in one line."""
    parts = []
    for name, peer in result.peers.items():
        marks = ("" if peer.is_right else " WRONG") + mark(peer, result.isa)
        parts.append(f"{name} {'failed' if peer.failure else f'{peer.median_ms:.2f} ms{marks}'}")
    return ", ".join(parts)


def ratio_table(rows: Sequence[ModelResult], title: str) -> Table:
    """Latency of each peer, and of the best one, divided by sepc's; the last row holds the geometric means.

    The best is among those that obey a limit on instruction sets at least in part, see `PeerResult.competes`.
    """
    peers = [name for name in _peers(rows) if name != OWN]
    table = _table(title, [*peers, "best peer"])
    columns = [[ratio(row, name) for row in rows] for name in peers]
    columns.append([best_peer_ratio(row) for row in rows])
    for row, values in zip(rows, zip(*columns, strict=True), strict=True):
        table.add_row(row.model, *map(_ratio_cell, values))
    table.add_section()
    table.add_row("geometric mean", *(_ratio_cell(geometric_mean(column)) for column in columns))
    if escaped := [name for name in peers if any(_escaped(row, name) for row in rows)]:
        table.caption = f"not counted as best peer, since unrestricted: {', '.join(escaped)}"
    return table


def error_table(rows: Sequence[ModelResult], title: str) -> Table:
    """Largest relative error of each runner; above the tolerance in red."""
    table = _table(title, _peers(rows))
    for row in rows:
        cells = []
        for name in _peers(rows):
            peer = row.peers.get(name)
            has_error = peer is not None and not peer.failure
            style = "red" if has_error and peer is not None and not peer.is_right else ""
            cells.append(Text(f"{peer.error:.1e}" if has_error and peer is not None else "–", style=style))
        table.add_row(row.model, *cells)
    table.caption = f"tolerance {TOLERANCE:g}"
    return table


def ratio(row: ModelResult, name: str) -> float:
    """Latency of runner `name` divided by sepc's; not a number unless both have right results."""
    if not (_is_valid(row, name) and _is_valid(row, OWN)):
        return math.nan
    return row.peers[name].median_ms / row.peers[OWN].median_ms


def best_peer_ratio(row: ModelResult) -> float:
    """Latency of the fastest other runner that competes divided by sepc's."""
    ratios = (ratio(row, name) for name, peer in row.peers.items() if name != OWN and peer.competes)
    return min((value for value in ratios if not math.isnan(value)), default=math.nan)


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of the values that are numbers; not a number if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.geometric_mean(numbers) if numbers else math.nan


def _ratio_cell(value: float) -> Text:
    if math.isnan(value):
        return Text("–")
    return Text(f"{value:.2f}", style="green" if value >= 1.0 else "yellow")


def _is_valid(row: ModelResult, name: str) -> bool:
    return name in row.peers and row.peers[name].is_right


def _escaped(row: ModelResult, name: str) -> bool:
    """Whether that runner has a valid result, but one that must not be taken for the best."""
    return _is_valid(row, name) and not row.peers[name].competes


def _peers(rows: Sequence[ModelResult]) -> list[str]:
    """Names of all runners, in the order in which they were asked for."""
    return list(dict.fromkeys(name for row in rows for name in row.peers))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def describe_machine() -> dict[str, object]:
    """The processor, memory, system and current load."""
    fields = _processor_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": [fields.get(key) for key in ("cpu family", "model", "stepping")],
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "logical_processors": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def _processor_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def describe_versions() -> dict[str, str]:
    """Versions of the packages that take part, as far as they are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_json(path: Path, results: Sequence[ModelResult], command: str, settings: dict[str, object]) -> None:
    """Write everything measured, and what is needed to repeat it."""
    document = {
        "command": command,
        "settings": settings,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "results": [result.to_json() for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_chart(path: Path, results: Sequence[ModelResult]) -> None:
    """Draw bars of latency relative to sepc (to eager where sepc has none), one panel for every number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({result.threads for result in results})
    width = max(6.0, 1.3 * len({result.model for result in results}) + 2.0)
    figure, axes = pyplot.subplots(len(counts), 1, figsize=(width, 3.6 * len(counts)), squeeze=False)
    for threads, panel in zip(counts, axes[:, 0], strict=True):
        rows = [result for result in results if result.threads == threads]
        _draw_panel(panel, rows)
        panel.set_title(f"{_conditions(rows)}, {describe_machine()['processor']}", fontsize=10)
    axes[0, 0].legend(fontsize=8, ncols=len(_peers(results)), loc="upper right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_panel(panel: Axes, rows: Sequence[ModelResult]) -> None:
    peers = _peers(rows)
    base = OWN if any(_is_valid(row, OWN) for row in rows) else peers[0]
    bar_width = 0.8 / len(peers)
    for index, name in enumerate(peers):
        drawn = [(x, row) for x, row in enumerate(rows) if _is_valid(row, name) and _is_valid(row, base)]
        heights = [row.peers[name].median_ms / row.peers[base].median_ms for _, row in drawn]
        positions = [x + (index - (len(peers) - 1) / 2) * bar_width for x, _ in drawn]
        bars = panel.bar(positions, heights, bar_width, label=name, color=_COLOURS.get(name))
        labels = [f"{row.peers[name].median_ms:.3g}{mark(row.peers[name], row.isa)}" for _, row in drawn]
        panel.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.margins(y=0.25)
    panel.set_ylabel(f"latency relative to {base}\n(labels: ms)", fontsize=8)
    panel.set_xticks(range(len(rows)), [row.model for row in rows], rotation=20, ha="right", fontsize=8)
