"""Accuracy against measured latency, for networks made separable by sepc.

    python -m benchmarks.separate [--networks vgg resnet] [--seeds 0] [--speedups 1.5 2 3 4 6]

Trains the networks on Fashion-MNIST if they are not among the checkpoints, separates them for each speed-up with 512
unlabelled training images, and prints top-1 on all 10,000 test images and the latency of the compiled separated network
against that of the compiled dense one, batch 1. Both are timed in turn, round after round, apart from the timing that
`sepc.separate` does for itself. "Weights only" has the same forms and ranks, fitted without data. Writes separate.json,
separate.txt and separate.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

import sepc
from benchmarks.fma_bound import in_turn
from benchmarks.measure import TOLERANCE, relative_error
from benchmarks.separate.data import Images, MissingDataError, load
from benchmarks.separate.networks import NETWORKS, accuracy, trained
from sepc._separate import DEFAULT_FORMS
from sepc.separable.calibrated import Option, fit_weights
from sepc.separable.plan import Plan
from sepc.separation.budget import Budget
from sepc.separation.data import in_batches
from sepc.separation.job import Job
from sepc.separation.menus import allocations
from sepc.separation.search import search
from sepc.target import Target

CALIBRATION: Final = 512
STEPS: Final = 40
RESULTS: Final = Path(__file__).parents[1] / "results"
CHECKPOINTS: Final = Path(torch.hub.get_dir()) / "checkpoints" / "sepc-separate"


@dataclass(frozen=True)
class Row:
    """One network at one speed-up.

    Attributes:
        network, seed, threads: which, and how it ran.
        wanted: the speed-up that was asked for; 1 is the network as it was.
        speedup: as measured here. dense_us, separated_us: the medians that it is the ratio of.
        top1, weights_only_top1: in percent, calibrated, and by weights alone.
        multiply_adds: of the dense convolutions' over those of the separated ones.
        seconds: that the search and the fit took, beside the menus, which all speed-ups of a network share.
        forms: how many layers became what.
    """

    network: str
    seed: int
    threads: int
    wanted: float
    speedup: float
    dense_us: float
    separated_us: float
    top1: float
    weights_only_top1: float
    multiply_adds: float
    seconds: float
    forms: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if a compiled network is wrong, 2 if there is no data."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.separate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.5, 2.0, 3.0, 4.0, 6.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each network when latency is measured")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help=f"default: {CHECKPOINTS}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        test, train = load(train=False), load(train=True)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in options.networks:
        for seed in options.seeds:
            model = trained(name, seed, options.checkpoints)
            job = Job(
                model,
                in_batches(train.images, CALIBRATION),
                (test.images[:1],),
                Target.parse("native"),
                options.threads,
                DEFAULT_FORMS,
                STEPS,
                seed=0,
            )
            for row in measured(job, name, seed, test, options.speedups, options.rounds):
                rows.append(row)
                print(line(row), flush=True)
                write(rows, options.output)
    return 0


def measured(job: Job, name: str, seed: int, test: Images, speedups: Sequence[float], rounds: int) -> Iterator[Row]:
    """The network as it was, and for each speed-up what became of it; what is out of reach is left out."""
    top1 = accuracy(job.model, test)
    yield Row(name, seed, job.threads, 1.0, 1.0, 0.0, 0.0, top1, top1, 1.0, 0.0, {})
    begin_s = time.perf_counter()
    with torch.no_grad():
        choices = allocations(job)
    print(f"{name}, seed {seed}: menus of all layers in {time.perf_counter() - begin_s:.0f} s", flush=True)
    for wanted in speedups:
        begin_s = time.perf_counter()
        with torch.no_grad():
            result = search(job, choices, Budget.of(None, wanted, None, None))
        seconds = time.perf_counter() - begin_s
        if result.reason:
            print(f"{name}, seed {seed}, {wanted:g}×: {result.reason}", flush=True)
            continue
        speedup, dense_us, separated_us = latencies(job, result.model, rounds)
        before, after = result.multiply_adds
        forms: dict[str, int] = {}
        for one in result.layers:
            forms[one.form] = forms.get(one.form, 0) + 1
        yield Row(
            name,
            seed,
            job.threads,
            wanted,
            speedup,
            dense_us,
            separated_us,
            accuracy(result.model, test),
            accuracy(weights_only(job, result.plan).apply(job.model), test),
            before / after,
            seconds,
            forms,
        )


def weights_only(job: Job, plan: Plan) -> Plan:
    """The same forms and ranks, fitted to the weights without any data."""
    layers = {one.path: one for one in job.found[0]}
    with torch.no_grad():
        return Plan(
            {
                path: fit_weights(layers[path], Option(one.form, one.rank), job.graph, job.steps, job.seed)
                for path, one in plan.layers.items()
            }
        )


def latencies(job: Job, model: nn.Module, rounds: int) -> tuple[float, float, float]:
    """How many times as fast `model` is, and the median times of both in microseconds; raises if one is wrong."""
    (x,) = job.example
    compiled = [
        sepc.compile(one, target=job.target, example_inputs=(x,), num_threads=job.threads) for one in (job.model, model)
    ]
    with torch.inference_mode():
        for one, reference in zip(compiled, (job.model, model), strict=True):
            error = relative_error([one(x)], [reference(x)])
            if not error <= TOLERANCE:
                raise RuntimeError(f"a compiled network is off by {error:.1e}")
        dense, separated = in_turn([partial(one, x) for one in compiled], rounds)
    ratio = statistics.median(a / b for a, b in zip(dense, separated, strict=True))
    return ratio, 1e3 * statistics.median(dense), 1e3 * statistics.median(separated)


def line(row: Row) -> str:
    """A row as text."""
    if row.wanted == 1:
        return f"{row.network:7} seed {row.seed}  dense                                top-1 {row.top1:.2f}"
    forms = ", ".join(f"{count} {form}" for form, count in sorted(row.forms.items()))
    return (
        f"{row.network:7} seed {row.seed}  {row.wanted:g}×: measured {row.speedup:.2f}× ({row.dense_us:.0f} → "
        f"{row.separated_us:.0f} µs)  top-1 {row.top1:.2f}  weights only {row.weights_only_top1:.2f}  "
        f"{row.multiply_adds:.1f}× fewer multiply-adds  {row.seconds:.0f} s  [{forms}]"
    )


def write(rows: Sequence[Row], folder: Path) -> None:
    """All rows as JSON, as text and as a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "separate.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (folder / "separate.txt").write_text("\n".join(map(line, rows)) + "\n")
    plot(rows, folder / "separate.svg")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Top-1 against the measured speed-up, a curve for each network and way of fitting."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, seed in sorted({(row.network, row.seed) for row in rows}):
        own = [row for row in rows if (row.network, row.seed) == (name, seed)]
        speedups = [row.speedup for row in own]
        (curve,) = axes.plot(speedups, [row.top1 for row in own], "o-", label=f"{name}, seed {seed}: 512 images")
        weights = [row.weights_only_top1 for row in own]
        axes.plot(speedups, weights, "x:", color=curve.get_color(), label=f"{name}, seed {seed}: weights only")
    lowest = min(row.top1 for row in rows)
    axes.set_ylim(lowest - 3, max(row.top1 for row in rows) + 0.5)
    axes.set_xlabel("times as fast as the dense network, both compiled by sepc")
    axes.set_ylabel("top-1 on 10,000 test images, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
