"""What came of it: the rewritten model, measured beside the original, and a row for each layer."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, Final

from torch import nn

from sepc.separable.calibrated import Option
from sepc.separable.forms import FORMS
from sepc.separable.layers import DenseLayer
from sepc.separable.plan import Plan, Replacement
from sepc.separable.result import LayerReport, Separation
from sepc.separation.budget import Budget
from sepc.separation.distill import Distillation
from sepc.separation.job import AS_IT_WAS, Job

if TYPE_CHECKING:
    from sepc.compiled import CompiledModel

# Many short turns, of each the quickest call: what else the machine does then delays few of them, and both alike.
ROUNDS: Final = 40
CALLS: Final = 5
WARM_UP: Final = 2


def report(
    job: Job,
    budget: Budget,
    plan: Plan | None,
    reason: str = "",
    measured: tuple[float, float] | None = None,
    distilled: Distillation | None = None,
) -> Separation:
    plan = plan or Plan()
    model = plan.apply(job.model)
    if measured is None and plan.layers and job.target.is_runnable:
        measured = measure(job, model)
    after_us = job.predict(model) if plan.layers else job.dense_us
    return Separation(
        model=model,
        plan=plan,
        layers=[_layer_report(job, one, plan.layers.get(one.path)) for one in job.found[0]],
        left=job.found[1],
        budget=str(budget),
        error=job.error(model) if job.batches else math.nan,
        predicted_us=(job.dense_us, after_us),
        measured_us=measured,
        reason=reason,
        distilled="" if distilled is None else str(distilled),
    )


def _layer_report(job: Job, layer: DenseLayer, replacement: Replacement | None) -> LayerReport:
    size, batch = job.images[layer.path][2:], job.images[layer.path][0]
    dense, dense_us = batch * layer.geometry.multiply_adds(size), job.dense_times_us[layer.path]
    if replacement is None:
        return LayerReport(layer.path, AS_IT_WAS.form, 0, 0.0, (dense, dense), (dense_us, dense_us))
    form, rank = FORMS[replacement.form], replacement.rank
    less = batch * form.multiply_adds(layer.geometry, rank, size)
    less_us = job.layer_us(layer, Option(replacement.form, rank))
    return LayerReport(layer.path, replacement.form, rank, replacement.error, (dense, less), (dense_us, less_us))


def measure(job: Job, model: nn.Module) -> tuple[float, float]:
    """Times of the original and of `model`, both compiled, some calls of each in turn: medians of the turns' minima."""
    from sepc._compile import compile as compile_model

    both = [
        compile_model(one, target=job.target, example_inputs=job.example, num_threads=job.threads)
        for one in (job.model, model)
    ]
    samples: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for one, own in zip(both, samples, strict=True):
            own.append(min([_call_us(one, job) for _ in range(WARM_UP + CALLS)][WARM_UP:]))
    before, after = map(statistics.median, samples)
    return before, after


def _call_us(model: CompiledModel, job: Job) -> float:
    begin_ns = time.perf_counter_ns()
    model(*job.example)
    return (time.perf_counter_ns() - begin_ns) / 1e3
