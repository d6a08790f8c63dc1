"""What the parts of this benchmark share: figures over many cases, and the files they leave."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sepc.bench.report import describe_machine, describe_versions

RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Report:
    """What one part found.

    Attributes:
        name: of the part. title: what its table shows.
        columns: headings. rows: the table's cells.
        summary: the lines that answer 'Must show'. settings: how it was measured.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: list[list[str | int | float]] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)

    def text(self) -> str:
        """The table and the summary as plain text."""
        table = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [self.title, ""]
        for row in table if self.rows else []:
            cells = [
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, "", *self.summary, ""])

    def write(self, directory: Path) -> list[Path]:
        """Write the text and all figures as JSON; returns the paths."""
        directory.mkdir(parents=True, exist_ok=True)
        text, data = (directory / f"cost_model_{self.name}.{suffix}" for suffix in ("txt", "json"))
        text.write_text(self.text(), encoding="utf-8")
        document = {
            "command": shlex.join(["python", "-m", "benchmarks.cost_model", *sys.argv[1:]]),
            "settings": self.settings,
            "machine": describe_machine(),
            "versions": describe_versions(),
            "summary": self.summary,
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
        }
        data.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return [text, data]


def median_and_p90(values: Sequence[float]) -> tuple[float, float]:
    """Median and 90th percentile, by linear interpolation."""
    median, high = np.percentile(np.asarray(values, dtype=np.float64), [50, 90])
    return float(median), float(high)


def _cell(value: str | float) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else str(value if isinstance(value, str) else round(value))
    )
