"""Compare sepc with eager PyTorch, Inductor, ONNX Runtime, OpenVINO and XNNPACK on this machine.

    python -m benchmarks.compare mobilenetv2_100 resnet50 --threads 1 2
    python -m benchmarks.compare mobilenetv2_100 --isa avx2

Every pair of model and number of threads has a process of its own, shared by all runners. For a model of yours there is
`sepc-bench`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import models
from sepc.bench import processes, report
from sepc.bench.measure import ModelResult
from sepc.bench.peers import BUILDERS, ENVIRONMENTS, NATIVE
from sepc.bench.processes import Task

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit status is 1 if sepc took part and failed, or was wrong, on any model."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = []
    for threads in options.threads:
        for model in options.models:
            start_s = time.perf_counter()
            result = run_in_process(model, threads, options)
            results.append(result)
            console.print(
                f"{model}, {threads} thread(s): {report.summary(result)} [{time.perf_counter() - start_s:.0f} s]"
            )
    report.print_tables(console, results)
    command = shlex.join(["python", "-m", "benchmarks.compare", *(sys.argv[1:] if arguments is None else arguments)])
    stem = options.output / options.name
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    report.write_json(stem.with_suffix(".json"), results, command, settings)
    report.write_chart(stem.with_suffix(".svg"), results)
    console.print(f"Written: {stem.with_suffix('.json')}, {stem.with_suffix('.svg')}", soft_wrap=True)
    own = [result.peers[report.OWN] for result in results if report.OWN in result.peers]
    return 0 if all(peer.is_right for peer in own) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a timm model or a torchvision segmentation model")
    parser.add_argument("--threads", nargs="+", type=_positive, default=[1], metavar="N", help="default: 1")
    parser.add_argument("--batch", type=_positive, default=1, metavar="N", help="images per inference (default: 1)")
    size_help = f"pixels a side (default: {models.DEFAULT_SIZE}; some models have their own, as xception41 has 299)"
    parser.add_argument("--size", type=_positive, metavar="N", help=size_help)
    parser.add_argument("--rounds", type=_positive, default=9, metavar="N", help="turns for each runner (default: 9)")
    isa_help = "instruction sets that kernels may use (default: native); a runner that uses more is marked"
    parser.add_argument("--isa", choices=list(ENVIRONMENTS), default=NATIVE, help=isa_help)
    every = ",".join(BUILDERS)
    parser.add_argument("--peers", type=_peers, default=list(BUILDERS), metavar="A,B", help=f"default: {every}")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    name = time.strftime("compare_%Y-%m-%d_%H%M%S")
    parser.add_argument("--name", default=name, help="of the files to write, without suffix (default: date and time)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _peers(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in BUILDERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(BUILDERS)}")
    return names


def run_in_process(model: str, threads: int, options: argparse.Namespace) -> ModelResult:
    """Measure one model in a new process; if that dies, a result that says so for every runner."""
    load = partial(models.load, model, options.size, options.batch)
    return processes.run_in_process(Task(model, load, options.peers, options.rounds, threads, options.isa))


if __name__ == "__main__":
    sys.exit(main())
