"""``sepc-bench``: how fast a model of yours is as sepc, PyTorch and the other runners that are installed run it.

sepc-bench timm:mobilenetv2_100 --threads 1 2
sepc-bench net.py:make --peers eager,onnxruntime,sepc --json net.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sepc.cli import MODEL_FORMS, Parser
from sepc.errors import InputError, SepcError, did_you_mean

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

    from sepc.bench.measure import ModelResult

ROUNDS = 9


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 1 after an error, and where sepc failed, or was wrong, on any model."""
    options = parser().parse_args(arguments)
    try:
        return _run(options, sys.argv[1:] if arguments is None else arguments)
    except SepcError as error:
        print(f"sepc-bench: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="sepc-bench", description=(__doc__ or "").partition("\n")[0].partition(": ")[2])
    made.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_FORMS)
    made.add_argument("--input", action="append", default=[], metavar="SHAPE[:TYPE]", help="1x3x224x224; repeatable")
    made.add_argument("--threads", nargs="+", type=int, default=[1], metavar="N", help="default: 1")
    made.add_argument("--peers", metavar="A,B", help="runners, which are compared with eager (default: all installed)")
    made.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="turns for each runner (default: 9)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures, and what it takes to repeat them")
    return made


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    # Imported late: `--help` and a wrong option need none of it, and PyTorch takes seconds.
    from rich.console import Console

    from sepc.bench import report
    from sepc.bench.processes import Task, run_in_process
    from sepc.progress import waiting

    if min(options.rounds, *options.threads) < 1:
        raise InputError("There is nothing to measure", why="threads and rounds are counted from 1")
    peers, missing = _peers(options.peers)
    console = Console(width=None if sys.stdout.isatty() else 120)
    results: list[ModelResult] = []
    for model in options.models:
        for threads in options.threads:
            started = time.perf_counter()
            with waiting(f"{model}, {threads} thread(s)"):
                task = Task(model, partial(load, model, options.input), peers, options.rounds, threads)
                results.append(run_in_process(task))
            took = f"[{time.perf_counter() - started:.0f} s]"
            console.print(f"{model}, {threads} thread(s): {report.summary(results[-1])} {took}", markup=False)
    report.print_tables(console, results)
    _print_missing(console, missing)
    if options.json is not None:
        settings = {"input": options.input, "rounds": options.rounds, "missing": missing}
        report.write_json(options.json, results, shlex.join(["sepc-bench", *arguments]), settings)
        console.print(f"Written: {options.json}", soft_wrap=True, markup=False)
    own = [result.peers[report.OWN] for result in results if report.OWN in result.peers]
    return 0 if all(peer.is_right for peer in own) else 1


def load(text: str, inputs: Sequence[str]) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model that `text` names as a module, with tensors as its inputs; raises what `sepc.cli.models.load` does."""
    import torch
    from torch.export import ExportedProgram

    from sepc.cli import models

    given = models.load(text, inputs)
    if given.kwargs or not all(isinstance(one, torch.Tensor) for one in given.inputs):
        why = "runners take tensors by position, nothing else"
        raise InputError("The model has other inputs than tensors", where=text, why=why, fix="wrap it in a module")
    module = given.model.module() if isinstance(given.model, ExportedProgram) else given.model
    return module.requires_grad_(False), given.inputs


def _peers(text: str | None) -> tuple[list[str], dict[str, str]]:
    """The runners to measure, and for those that cannot be the reason; raises InputError for one that is unknown."""
    from sepc.bench.peers import BUILDERS, why_missing

    names = list(BUILDERS) if text is None else text.split(",")
    reasons = {name: why_missing(name) for name in BUILDERS}
    for name in names:
        if name not in BUILDERS:
            known = "\n    ".join(f"{one}{f' ({why})' if why else ''}" for one, why in reasons.items())
            why, fix = f"known are\n    {known}", did_you_mean(name, BUILDERS)
            raise InputError(f"There is no peer '{name}'", where="--peers", why=why, fix=fix)
    missing = {name: reasons[name] for name in names if reasons[name]}
    return [name for name in names if name not in missing], missing


def _print_missing(console: Console, missing: dict[str, str]) -> None:
    for name, why in missing.items():
        console.print(f"{name} is not measured: {why}", style="yellow", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
