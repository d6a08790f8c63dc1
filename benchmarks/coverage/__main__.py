"""Run many models through `sepc.compile` and `torch.compile(backend="sepc")`, and say what became of each.

    python -m benchmarks.coverage
    python -m benchmarks.coverage botnet26t_256 torchvision/fcn_resnet50 --rounds 0

Every model has a process of its own, one at a time. The table is written anew after each, so that a run that was
stopped goes on with --resume.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import RESULTS
from benchmarks.coverage import table, zoo
from benchmarks.coverage.one_model import EXPORT, WAYS, Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all models; the exit status is 1 if one did not pass."""
    options = parse(arguments)
    command = shlex.join(["python", "-m", "benchmarks.coverage", *(sys.argv[1:] if arguments is None else arguments)])
    names = options.models or zoo.names(every=options.all)
    known = {row.model: row for row in table.read(options.output)} if options.resume else {}
    rows = [known[name] for name in names if name in known]
    missing = [name for name in names if name not in known]
    for number, name in enumerate(missing, 1):
        start_s = time.perf_counter()
        row = run_in_process(name, options)
        rows.append(row)
        rows.sort(key=lambda one: names.index(one.model))
        taken_s = time.perf_counter() - start_s
        print(f"[{number}/{len(missing)}] {name}: {_progress(row)} [{taken_s:.0f} s]", flush=True)
        table.write(options.output, rows, command)
    print(table.text(rows))
    print("Written:", ", ".join(map(str, table.write(options.output, rows, command))))
    return 0 if all(table.verdict(row) == table.PASSED for row in rows) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=summary)
    default = "default: the timm models of PyTorch's Dynamo benchmark, and torchvision's, one a family"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"a timm model, or torchvision/<name>; {default}")
    parser.add_argument("--all", action="store_true", help="every model of torchvision")
    rounds_help = "turns of eager and of each way (default: 5); 0: only whether results are right"
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help=rounds_help)
    ways_help = "export: sepc.compile; dynamo: torch.compile, where this sepc has that backend (default: both)"
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=ways_help)
    parser.add_argument("--size", type=int, metavar="N", help="pixels a side (default: what the model is made for)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="seconds a model (default: 900)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output has of these models")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    return parser.parse_args(arguments)


def run_in_process(name: str, options: argparse.Namespace) -> Row:
    """The row of a model from a process of its own; one with the failure if that crashed or took too long."""
    with tempfile.TemporaryDirectory(prefix="sepc-") as directory:
        output = Path(directory) / "row.json"
        command = [sys.executable, "-m", "benchmarks.coverage.one_model", name, "--rounds", str(options.rounds)]
        command += ["--output", str(output), "--ways", *options.ways]
        command += ["--size", str(options.size)] if options.size else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, env=environment, timeout=options.timeout, check=False, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return Row(name, failure=f"it took longer than {options.timeout:.0f} s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing on its standard error"])[-1]
            return Row(name, failure=f"the process ended with status {done.returncode}: {last[:200]}")
        return table.row_from_json(json.loads(output.read_text(encoding="utf-8")))


def _progress(row: Row) -> str:
    """The verdict, and the figures that a reader waits for."""
    found = row.ways.get(EXPORT)
    error = f", error {found['error']:.1e}" if found and found["error"] is not None and not found["failure"] else ""
    gain = table.speed_up(row)
    return f"{table.verdict(row)}{error}" + (f", {gain:.2f} times as fast as eager" if not math.isnan(gain) else "")


if __name__ == "__main__":
    sys.exit(main())
