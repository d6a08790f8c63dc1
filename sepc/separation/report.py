"""What came of it: the rewritten model, measured beside the original, and a row for each layer."""

from __future__ import annotations

import math

from torch import nn

from sepc.separable.calibrated import Option
from sepc.separable.forms import FORMS
from sepc.separable.layers import DenseLayer
from sepc.separable.plan import Plan, Replacement
from sepc.separable.result import LayerReport, Separation
from sepc.separation.budget import Budget
from sepc.separation.distill import Distillation
from sepc.separation.job import AS_IT_WAS, Job
from sepc.separation.latency import Timing, timing


def report(
    job: Job,
    budget: Budget,
    plan: Plan | None,
    reason: str = "",
    measured: Timing | None = None,
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
        measured_us=None if measured is None else (measured.dense_us, measured.dense_us / measured.speedup),
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


def measure(job: Job, model: nn.Module) -> Timing:
    """How fast the original and `model` are, both compiled."""
    from sepc._compile import compile as compile_model

    dense, reduced = (
        compile_model(one, target=job.target, example_inputs=job.example, num_threads=job.threads)
        for one in (job.model, model)
    )
    return timing(dense, reduced, job.example)
