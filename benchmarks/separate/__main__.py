"""Accuracy against measured latency, for networks made separable by sepc, and by methods of the literature.

    python -m benchmarks.separate [--networks vgg resnet] [--seeds 0 1] [--methods sepc decoupling …] [--speedups 2 3]

Trains the networks on Fashion-MNIST if they are not among the checkpoints. For each speed-up sepc separates them with
512 unlabelled training images; the methods of the literature get the strength at which they are as fast, as measured,
found by bisection, and afterwards means and variances of the normalisations from the same images. Top-1 is of all
10,000 test images, latency that of the network compiled by sepc against the dense network compiled by sepc, batch 1,
timed in turn, round after round, apart from all timing that a search does for itself. "Weights only" has the forms and
ranks of the calibrated network, fitted without data; "distilled" has them too, trained for so many steps to do what the
dense network does, on all training images without their labels.

Rows are added to those in separate.json, of which separate.txt and separate.svg are made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks.separate import ours, theirs
from benchmarks.separate.data import MissingDataError, load
from benchmarks.separate.methods import METHODS
from benchmarks.separate.networks import NETWORKS, trained
from benchmarks.separate.results import Row, line, merged, read, write
from benchmarks.separate.subject import Subject

CALIBRATION: Final = 512
SEPC: Final = "sepc"
RESULTS: Final = Path(__file__).parents[1] / "results"
CHECKPOINTS: Final = Path(torch.hub.get_dir()) / "checkpoints" / "sepc-separate"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 2 if there is no data."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        test, train = load(train=False), load(train=True)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    rows = read(options.output / "separate.json")
    for name in options.networks:
        for seed in options.seeds:
            model = trained(name, seed, options.checkpoints)
            subject = Subject(name, seed, model, train.images, CALIBRATION, test, options.threads, options.rounds)
            for row in measured(subject, options.methods, options.speedups, options.distill_steps):
                print(line(row), flush=True)
                rows = merged(rows, [row])
                write(rows, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    names = [SEPC, *METHODS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.separate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.5, 2.0, 3.0, 4.0, 6.0])
    parser.add_argument("--distill-steps", type=int, default=400, help="of sepc's distillation; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200, help="turns of each network when latency is measured")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help=f"default: {CHECKPOINTS}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser


def measured(subject: Subject, methods: Sequence[str], speedups: Sequence[float], distill_steps: int) -> Iterator[Row]:
    """The network as it was, and what each method makes of it for each speed-up; what is out of reach is left out."""
    yield subject.dense_row()
    for name in methods:
        if name == SEPC:
            yield from ours.rows_of(subject, speedups, distill_steps)
        else:
            yield from theirs.rows_of(subject, METHODS[name], speedups)


if __name__ == "__main__":
    sys.exit(main())
