"""Check the analytic cost model against measurements.

    python -m benchmarks.cost_model all
    python -m benchmarks.cost_model choice fusion --quick

Each part prints its lines, and leaves a table and JSON in benchmarks/results/cost_model_<part>.{txt,json}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.cost_model import bytes as bytes_part
from benchmarks.cost_model import cachegrind, choice, fusion, gpu, memory
from benchmarks.cost_model.results import RESULTS, Report

PARTS = ("bytes", "choice", "fusion", "memory", "gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; the exit status is 1 if one could not run."""
    options = parse(arguments)
    names = PARTS if "all" in options.parts else options.parts
    runs: dict[str, Callable[[], Report]] = {
        "bytes": partial(bytes_part.run, quick=options.quick),
        "choice": partial(choice.run, quick=options.quick, threads=options.threads),
        "fusion": partial(fusion.run, quick=options.quick, threads=options.threads),
        "memory": partial(memory.run, quick=options.quick, threads=options.threads),
        "gpu": partial(gpu.run, quick=options.quick),
    }
    status = 0
    for name in dict.fromkeys(names):
        if name == "bytes" and not cachegrind.is_installed():
            print("Bytes: skipped, valgrind is not installed (Debian: apt-get install valgrind)")
            status = 1
            continue
        report = runs[name]()
        print(report.text())
        paths = report.write(options.output)
        print("Written:", ", ".join(map(str, paths)), flush=True)
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model", description=summary)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "all"], default=["all"], help="default: all")
    parser.add_argument("--quick", action="store_true", help="fewer cases, to see that everything works")
    parser.add_argument("--threads", type=int, choices=range(1, 257), default=1, metavar="N", help="default: 1")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
