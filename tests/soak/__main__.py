"""The soak test: ``python -m tests.soak --minutes 30`` tries everything in turn, each kind of trial at least once.

Trials run in processes of their own, so that one that crashes is counted, and told with its last words. With ``--report
docs/reliability.md`` the counts go there; ``--only KIND --seed N`` repeats a trial.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.soak.outcome import Outcome, Trial
from tests.soak.report import Soak, write

KINDS: Mapping[str, tuple[str, ...]] = {
    "compute": ("random_models", "random_tilings", "exported_c", "unusual_inputs", "whole_models"),
    "files": ("malformed_files", "hostile_json"),
    "faults": ("faults", "out_of_memory", "killed", "cache"),
    "load": ("threads", "forks", "memory"),
}
WEIGHTS = {"whole_models": 5.0}
"""How much longer than the others a kind of trial has its turn."""
TURN_S = 60.0
"""How long a kind of trial of weight 1 has its turn, at most."""
HANGS_S = 900.0
"""A trial that takes longer hangs."""
MARK = "outcome "


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: %(default)s)")
    parser.add_argument("--only", metavar="KIND", action="append", help="only trials of this kind; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where to write the counts as Markdown")
    parser.add_argument("--turn", nargs=2, metavar=("KIND", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.turn:
        _turn(options.turn[0], options.seed, float(options.turn[1]))
        return 0
    soak = run(options.minutes, options.only or [name for names in KINDS.values() for name in names], options.seed)
    print(soak.text())
    if options.report:
        write(options.report, soak)
    return int(soak.failed)


def run(minutes: float, names: Sequence[str], first_seed: int = 0) -> Soak:
    """Try all kinds of trials in turn until the time is up, and each of them once whatever the time."""
    soak, end = Soak(minutes), time.monotonic() + 60 * minutes
    seeds = dict.fromkeys(names, first_seed)
    weights = {name: WEIGHTS.get(name, 1.0) for name in names}
    unit_s = min(TURN_S, 60 * minutes / sum(weights.values()))
    for number, name in enumerate(itertools.cycle(names)):
        left = end - time.monotonic()
        if left <= 0 and number >= len(names):
            break
        seeds[name] = _one_turn(soak, name, seeds[name], min(unit_s * weights[name], max(1.0, left)))
        print(f"{name}: {soak.line()}", file=sys.stderr, flush=True)
    soak.ended()
    return soak


def _one_turn(soak: Soak, name: str, seed: int, seconds: float) -> int:
    """Run trials in another process for so long; returns the seed that comes next."""
    command = [sys.executable, "-m", "tests.soak", "--turn", name, str(seconds), "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or []))
    reader.start()
    hang = threading.Timer(seconds + HANGS_S, process.kill)
    hang.start()
    last = ""
    for line in process.stdout or []:
        if line.startswith(MARK):
            soak.add(Outcome.of_json(line.removeprefix(MARK)))
            seed += 1
        else:
            last = line.strip()
    process.wait()
    hang.cancel()
    reader.join()
    if process.returncode:
        why = "".join(errors[-3:]).strip()
        soak.crashed(f"{name} with seed {seed}: {process.returncode}, after '{last}': {why}")
        seed += 1
    return seed


def _turn(name: str, seed: int, seconds: float) -> None:
    trial, end = _trial(name), time.monotonic() + seconds
    while True:
        with tempfile.TemporaryDirectory(prefix="sepc-soak-", dir="/tmp") as directory:
            outcome = trial(seed, Path(directory))
        print(MARK + outcome.to_json(), flush=True)
        seed += 1
        if time.monotonic() >= end:
            return


def _trial(name: str) -> Trial:
    os.environ["SEPC_CACHE"] = "0"
    module = next(module for module, names in KINDS.items() if name in names)
    found: Trial = getattr(importlib.import_module(f"tests.soak.{module}"), name)
    return found


if __name__ == "__main__":
    sys.exit(main())
