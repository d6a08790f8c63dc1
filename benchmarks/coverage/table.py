"""The table of all models: as text for people, as JSON for programs and for going on where a run was stopped."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.coverage.one_model import (
    DYNAMO,
    EXPORT,
    LEAST_VARIATION,
    WAYS,
    Partition,
    Row,
)
from sepc.bench.report import describe_machine, describe_versions

COLUMNS = (
    "model",
    "pixels",
    "passed",
    "own %",
    "TVM %",
    "PyTorch %",
    "convolutions",
    "regions",
    "compile s",
    "eager ms",
    "sepc ms",
    "speed-up",
    "dynamo s",
    "dynamo ms",
)
PASSED = "yes"
_LEGEND = """\
own, TVM, PyTorch: share of FLOPs of convolutions and matrix products. convolutions: in sepc's own stages / all.
regions: by sepc's own stages + TVM + PyTorch. compile: sepc.compile without its cache. ms: median of rounds in turn,
one thread. dynamo: torch.compile(backend="sepc"), first call and time of a call."""


def verdict(row: Row) -> str:
    """`PASSED`, or what is wrong."""
    if row.failure:
        return row.failure
    tried = {way: found for way in WAYS if (found := row.ways.get(way))}
    if not tried:
        return "nothing was tried"
    if row.variation < LEAST_VARIATION:
        return f"degenerate: outputs of two images differ by {row.variation:.1g}"
    for way, found in tried.items():
        if found["failure"]:
            return f"{way}: {found['failure']}"
        if not found["is_right"]:
            own = f"; eager is {row.eager_error:.2g} from float64" if row.eager_error is not None else ""
            error = found["error"]
            return f"{way}: not a number" if error is None else f"{way}: WRONG by {error:.2g}{own}"
    return PASSED


def speed_up(row: Row) -> float:
    """How many times as fast as eager, by `sepc.compile` or, where that is not for the model, by Dynamo."""
    eager_ms = _milliseconds(row, "eager")
    own_ms = _milliseconds(row, EXPORT if EXPORT in row.ways else DYNAMO)
    return eager_ms / own_ms


def text(rows: Sequence[Row]) -> str:
    """Table, what failed, fallbacks with their reasons, and the lines that sum up."""
    cells = [list(COLUMNS), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    failed = [f"{row.model}: {verdict(row)}" for row in rows if verdict(row) != PASSED]
    if failed:
        lines += ["", "Not passed:", *failed]
    slower = [f"{row.model}: {speed_up(row):.2f}" for row in rows if speed_up(row) < 1]
    if slower:
        lines += ["", "Slower than eager:", *slower]
    return "\n".join([*lines, "", _LEGEND, "", *_fallback_lines(rows), "", *summary(rows), ""])


def _fallback_lines(rows: Sequence[Row]) -> list[str]:
    """Per reason the number of regions, and the models."""
    regions, models = Counter[str](), dict[str, list[str]]()
    for row in rows:
        for reason, count in (row.partition.fallbacks if row.partition else {}).items():
            regions[reason] += count
            models.setdefault(reason, []).append(f"{row.model} {count}")
    lines = [f"{count:5}  {reason}: {', '.join(models[reason])}" for reason, count in regions.most_common()]
    return ["Regions that are not of sepc's own stages, by reason:", *lines] if lines else []


def summary(rows: Sequence[Row]) -> list[str]:
    """What the whole list shows."""
    verdicts = Counter(verdict(row) for row in rows)
    own, convolutions = (sum(count) for count in zip(*map(_convolutions, rows), strict=True)) if rows else (0, 0)
    gains = [gain for row in rows if not math.isnan(gain := speed_up(row))]
    lines = [f"{verdicts[PASSED]} of {len(rows)} models passed."]
    if convolutions:
        lines.append(f"{own} of {convolutions} convolutions in sepc's own stages: {own / convolutions:.1%}")
    if gains:
        slower = sum(gain < 1 for gain in gains)
        mean = statistics.geometric_mean(gains)
        lines.append(f"{slower} of {len(gains)} models slower than eager; geometric mean of the speed-up {mean:.2f}")
    return lines


def write(directory: Path, rows: Sequence[Row], command: str) -> list[Path]:
    """Write the table and all figures; returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    table, data = paths(directory)
    table.write_text(text(rows), encoding="utf-8")
    document = {
        "command": command,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "summary": summary(rows),
        "rows": [{**asdict(row), "verdict": verdict(row)} for row in rows],
    }
    data.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return [table, data]


def read(directory: Path) -> list[Row]:
    """The rows that an earlier run left; none where there are none."""
    _, data = paths(directory)
    if not data.exists():
        return []
    return [row_from_json(one) for one in json.loads(data.read_text(encoding="utf-8"))["rows"]]


def row_from_json(values: Mapping[str, Any]) -> Row:
    """A row from what `dataclasses.asdict` makes of it."""
    found = {key: value for key, value in values.items() if key not in ("verdict", "partition")}
    shares = values.get("partition")
    return Row(**found, partition=Partition(**shares) if shares else None)


def paths(directory: Path) -> tuple[Path, Path]:
    """Where the text and the JSON are."""
    return directory / "coverage.txt", directory / "coverage.json"


def _cells(row: Row) -> list[str]:
    shares = row.partition.flops if row.partition else {}
    total = sum(shares.values())
    percent = [f"{100 * shares.get(kernel, 0) / total:.1f}" if total else "–" for kernel in ("sepc", "tvm", "torch")]
    own, convolutions = _convolutions(row)
    regions = row.partition.regions if row.partition else {}
    found = verdict(row)
    return [
        row.model,
        str(row.size),
        found if found == PASSED else "NO",
        *percent,
        f"{own}/{convolutions}" if row.partition else "–",
        "+".join(str(regions.get(kernel, 0)) for kernel in ("sepc", "tvm", "torch")) if regions else "–",
        _figure(_seconds(row, EXPORT)),
        _figure(_milliseconds(row, "eager")),
        _figure(_milliseconds(row, EXPORT)),
        _figure(speed_up(row)),
        _figure(_seconds(row, DYNAMO)),
        _figure(_milliseconds(row, DYNAMO)),
    ]


def _convolutions(row: Row) -> tuple[int, int]:
    """How many are in our own stages, and how many there are."""
    counts = row.partition.convolutions if row.partition else {}
    return counts.get("sepc", 0), sum(counts.values())


def _milliseconds(row: Row, way: str) -> float:
    """The median time; not a number where there is none, or it was not timed in turn."""
    found = row.ways.get(way)
    return found["median_ms"] if found and not found["failure"] and row.rounds else math.nan


def _seconds(row: Row, way: str) -> float:
    found = row.ways.get(way)
    return found["build_s"] if found and not found["failure"] else math.nan


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
