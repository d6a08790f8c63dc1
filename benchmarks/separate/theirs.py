"""A method of the literature on a network: for each speed-up the strength that gives it, and what accuracy is left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import nn

from benchmarks.separate.bisection import Trial, find
from benchmarks.separate.methods.method import Method
from benchmarks.separate.results import Row
from benchmarks.separate.subject import Subject, with_means_of

BISECTION_ROUNDS: Final = 60


def rows_of(subject: Subject, method: Method, speedups: Sequence[float]) -> Iterator[Row]:
    """A row for each speed-up in reach; means and variances of normalisations are of the same unlabelled images."""
    measured: dict[tuple[torch.Size, ...], float] = {}
    trials: list[Trial] = []

    def measure(strength: float) -> float:
        model = method.compress(subject.model, subject.example, strength)
        shapes = tuple(one.shape for one in model.parameters())
        if shapes not in measured:  # Nothing else matters to the time.
            measured[shapes] = subject.timing(model, BISECTION_ROUNDS).speedup
        return measured[shapes]

    for wanted in speedups:
        begin_s = time.perf_counter()
        found = find(wanted, measure, trials)
        if found is None:
            print(f"{subject.network}, seed {subject.seed}, {method.name}: {wanted:g}× is out of reach", flush=True)
            continue
        model = with_means_of(method.compress(subject.model, subject.example, found.strength), subject.calibration)
        seconds = time.perf_counter() - begin_s
        details = f"[strength {found.strength:.3f}: {_widths(model)}]"
        yield subject.row(method.name, wanted, model, subject.timing(model), seconds, details)


def _widths(model: nn.Module) -> str:
    return " ".join(str(one.out_channels) for one in model.modules() if isinstance(one, nn.Conv2d))
