"""sepc on a network: for each speed-up what it makes of it, from the weights alone and with more of the data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from benchmarks.separate.results import CALIBRATED, WEIGHTS_ONLY, WITH_MEANS, Row
from benchmarks.separate.subject import Subject, with_means_of
from sepc._separate import DEFAULT_FORMS
from sepc.separable.calibrated import Option, fit_weights
from sepc.separable.plan import Plan
from sepc.separation.budget import Budget
from sepc.separation.job import Job, in_batches
from sepc.separation.menus import allocations
from sepc.separation.search import search
from sepc.target import Target

STEPS: Final = 40


def rows_of(subject: Subject, speedups: Sequence[float]) -> Iterator[Row]:
    """Rows for each speed-up in reach: the calibrated network, and those of the same forms and ranks with less data."""
    size = len(subject.calibration)
    job = Job(
        subject.model,
        in_batches(subject.calibration, size),
        subject.example,
        Target.parse("native"),
        subject.threads,
        DEFAULT_FORMS,
        STEPS,
        seed=0,
    )
    begin_s = time.perf_counter()
    with torch.no_grad():
        choices = allocations(job)
    seconds = time.perf_counter() - begin_s
    print(f"{subject.network}, seed {subject.seed}: menus of all layers in {seconds:.0f} s", flush=True)
    for wanted in speedups:
        begin_s = time.perf_counter()
        with torch.no_grad():
            result = search(job, choices, Budget.of(None, wanted, None, None))
        seconds = time.perf_counter() - begin_s
        if result.reason:
            print(f"{subject.network}, seed {subject.seed}, {wanted:g}×: {result.reason}", flush=True)
            continue
        timing = subject.timing(result.model)
        forms = Counter(one.form for one in result.layers)
        details = f"[{', '.join(f'{count} {form}' for form, count in sorted(forms.items()))}]"
        yield subject.row(CALIBRATED, wanted, result.model, timing, seconds, details)
        by_weights = weights_only(job, result.plan).apply(subject.model)
        yield subject.row(WEIGHTS_ONLY, wanted, by_weights, timing, 0.0)
        yield subject.row(WITH_MEANS, wanted, with_means_of(by_weights, subject.calibration), timing, 0.0)


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
