"""sepc on a network: for each speed-up what it makes of it, from the weights alone and with more of the data.

All have the forms and ranks that the search chose with the calibration data, so that one measurement of time is of all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch

from benchmarks.separate.results import CALIBRATED, DISTILLED, WEIGHTS_ONLY, WITH_MEANS, Row
from benchmarks.separate.subject import Subject, with_means_of
from sepc._separate import DEFAULT_FORMS
from sepc.separable.calibrated import Option, fit_weights
from sepc.separable.plan import Plan
from sepc.separation.budget import Budget
from sepc.separation.data import in_batches
from sepc.separation.job import Job
from sepc.separation.menus import allocations
from sepc.separation.search import search
from sepc.target import Target

STEPS: Final = 40


def rows_of(subject: Subject, speedups: Sequence[float], distill_steps: int) -> Iterator[Row]:
    """Rows for each speed-up in reach: the calibrated network, those with less data, and that after distillation."""
    job = job_of(subject)
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
        if distill_steps:
            plan, distilled = replace(job, distill_steps=distill_steps).distill(result.plan)
            made = plan.apply(subject.model)
            yield subject.row(DISTILLED, wanted, made, timing, seconds + distilled.seconds, f"[{distilled}]")


def job_of(subject: Subject) -> Job:
    """To separate the network of `subject` by its calibration images, and to distil with all unlabelled ones."""
    return Job(
        subject.model,
        in_batches(subject.calibration, len(subject.calibration)),
        (subject.example,),
        Target.parse("native"),
        subject.threads,
        DEFAULT_FORMS,
        STEPS,
        seed=0,
        source=subject.unlabelled,
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
