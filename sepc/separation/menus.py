"""For each layer what it could become: forms and ranks that are predicted faster, with the error that each brings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from sepc.progress import progress
from sepc.separable.allocate import Candidate, frontier
from sepc.separable.calibrated import Option, Regression, fit_weights, walk
from sepc.separable.forms import FORMS
from sepc.separable.layers import DenseLayer
from sepc.separable.plan import Replacement
from sepc.separable.statistics import Statistics
from sepc.separable.twins import Twins
from sepc.separation.job import AS_IT_WAS, Choice, Job

logger = logging.getLogger(__name__)

# Ranks of a form that are tried: each so much smaller than the one before, from so much of the dense arithmetic on.
RANK_RATIO: Final = 0.7
MOST_ARITHMETIC: Final = 0.9
RANKS: Final = 7
# A rewrite has to be predicted faster by so much: a layer more has costs that the prediction does not see.
GAIN: Final = 0.95
MENU_STEPS: Final = 8


def allocations(job: Job) -> list[Choice]:
    """All that is worth choosing, from no change at all to the quickest."""
    found = menus(job)
    return frontier(found, sum(job.dense_times_us[path] for path in found))


def menus(job: Job) -> dict[str, list[Candidate[Option]]]:
    """For each layer its candidates: as it was, and all options that are predicted faster, with their errors."""
    options = {one.path: list(_options(job, one)) for one in progress(job.found[0], "times of layers")}
    layers = [one for one in job.found[0] if options[one.path]]
    menus = {one.path: [Candidate(AS_IT_WAS, job.dense_times_us[one.path], 0.0)] for one in layers}

    def add(layer: DenseLayer, fitted: Callable[[Option], Replacement]) -> None:
        for option, time_us in options[layer.path]:
            menus[layer.path].append(Candidate(option, time_us, fitted(option).error))
        logger.info("%s: %d options", layer.path, len(options[layer.path]))

    def visit(layer: DenseLayer, moments: Statistics) -> None:
        add(layer, partial(Regression.of(layer, moments, job.graph).fit, steps=MENU_STEPS, seed=job.seed))

    if job.batches:
        walk(Twins(job.graph, job.batches, job.kept_bytes), layers, visit, job.seed)
    else:
        for layer in progress(layers, "fits of layers"):
            add(layer, partial(fit_weights, layer, graph_module=job.graph, steps=MENU_STEPS, seed=job.seed))
    return menus


def _options(job: Job, layer: DenseLayer) -> Iterable[tuple[Option, float]]:
    """The options of a layer that are predicted faster than it is, with their times."""
    size, dense_us = job.images[layer.path][2:], job.dense_times_us[layer.path]
    dense = layer.geometry.multiply_adds(size)
    for name in job.forms:
        form = FORMS[name]
        most = form.full_rank(layer.geometry)
        while most and form.multiply_adds(layer.geometry, most, size) > MOST_ARITHMETIC * dense:
            most = min(most - 1, int(most * 0.98))
        for rank in _ranks(most, job.target.vector_lanes):
            time_us = job.layer_us(layer, Option(name, rank))
            if time_us < GAIN * dense_us:
                yield Option(name, rank), time_us


def _ranks(most: int, lanes: int) -> list[int]:
    """Ranks up to `most`: whole vectors of channels, where there are that many."""
    ranks = (most * RANK_RATIO**step for step in range(RANKS))
    whole = {int(rank) // lanes * lanes if rank >= lanes else int(rank) for rank in ranks}
    return sorted((rank for rank in whole if rank), reverse=True)
