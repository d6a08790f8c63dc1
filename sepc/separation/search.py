"""The search: a point on the frontier of times and errors that keeps within the budget when it is tried."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Final

from sepc.separable.plan import Plan
from sepc.separable.result import Separation
from sepc.separation.budget import Budget
from sepc.separation.distill import Distillation
from sepc.separation.job import Choice, Job
from sepc.separation.latency import Timing
from sepc.separation.report import measure, report

logger = logging.getLogger(__name__)

ATTEMPTS: Final = 5
# A measured speed-up may be above what was asked for by so much, before less is tried.
SLACK: Final = 1.04


def search(job: Job, choices: Sequence[Choice], budget: Budget) -> Separation:
    """What is best within `budget` of the `choices` on the frontier, from no change to the quickest."""
    return (by_error if budget.speedup is None else by_speed)(job, choices, budget)


def by_speed(job: Job, choices: Sequence[Choice], budget: Budget) -> Separation:
    """The least error at which the model is as fast as wanted, as measured if that can be."""
    assert budget.speedup is not None
    wanted, gain = budget.speedup, 0.0
    best: tuple[Choice, Timing] | None = None
    for _ in range(ATTEMPTS):
        choice = next((one for one in choices if job.predicted_for(one) * wanted <= job.dense_us), None)
        if choice is None:
            break
        if not job.target.is_runnable:
            return finished(job, budget, job.fit(choice))
        # Weights do not matter to the time: so before any are fitted.
        measured = measure(job, job.fit(choice, steps=0).apply(job.model))
        gain = measured.speedup
        logger.info("predicted %.2f, measured %.2f", wanted, gain)
        if gain >= budget.speedup and (best is None or gain < best[1].speedup):
            best = choice, measured
        if budget.speedup <= gain <= SLACK * budget.speedup:
            break
        wanted *= math.sqrt(SLACK) * budget.speedup / gain
    if best is not None:
        return finished(job, budget, job.fit(best[0]), best[1])
    most = job.dense_us / job.predicted_for(choices[-1])
    tried = f", and the last one that was tried gains {gain:.2f}" if gain else ""
    return report(job, budget, None, f"the most that all forms together are predicted to gain is {most:.2f}{tried}")


def by_error(job: Job, choices: Sequence[Choice], budget: Budget) -> Separation:
    """The fastest choice that is within the budget; each is fitted, and tried, before it is believed.

    With distillation, what is not within the budget as fitted is distilled, and tried again.
    """
    accepted: tuple[Plan, Distillation | None] | None = None
    lower, upper, tried = 0, len(choices), ""
    guess = _first_guess(choices, budget)
    for _ in range(ATTEMPTS):
        if not lower < guess < upper:
            guess = (lower + upper) // 2
        if guess in (lower, upper):
            break
        plan, distilled = job.fit(choices[guess]), None
        holds, ratio, tried = _holds(job, budget, choices[guess], plan)
        if not holds and job.distill_steps and plan.layers:
            plan, distilled = job.distill(plan)
            holds, ratio, tried = _holds(job, budget, choices[guess], plan)
        logger.info("predicted error %.3f: %s", choices[guess].error, tried)
        if holds:
            accepted, lower = (plan, distilled), guess
        else:
            upper = guess
        if distilled is not None and distilled.interrupted:
            break
        guess = _next_guess(choices, budget, ratio, lower, upper)
    if accepted is None:
        reason = f"even the smallest change that was tried gives {tried}" if tried else "no form is predicted faster"
        return report(job, budget, None, reason)
    plan, distilled = accepted
    if distilled is not None:
        return report(job, budget, plan, distilled=distilled)
    return finished(job, budget, plan)


def finished(job: Job, budget: Budget, plan: Plan, measured: Timing | None = None) -> Separation:
    """The report of a plan that is decided on, distilled if that was asked for."""
    if not (job.distill_steps and plan.layers):
        return report(job, budget, plan, measured=measured)
    plan, distilled = job.distill(plan)
    return report(job, budget, plan, measured=measured, distilled=distilled)


def _first_guess(choices: Sequence[Choice], budget: Budget) -> int:
    if budget.max_error is None:
        return len(choices) // 2
    return max(index for index, one in enumerate(choices) if one.error <= budget.max_error)


def _next_guess(choices: Sequence[Choice], budget: Budget, ratio: float, lower: int, upper: int) -> int:
    """Where the error would be as wanted if it stayed in proportion to the prediction; else in the middle."""
    if budget.max_error is None or not 0 < ratio < math.inf:
        return (lower + upper) // 2
    return max(index for index, one in enumerate(choices) if one.error * ratio <= budget.max_error)


def _holds(job: Job, budget: Budget, choice: Choice, plan: Plan) -> tuple[bool, float, str]:
    """Whether a plan is within the budget; its error over that predicted; and what it gives, in words."""
    if budget.max_error is not None and not job.batches:
        error = math.sqrt(sum(one.error**2 for one in plan.layers.values()))
        return error <= budget.max_error, error / choice.error, f"an error of {error:.4f}"
    model = plan.apply(job.model)
    if budget.max_error is not None:
        error = job.error(model)
        return error <= budget.max_error, error / choice.error, f"an error of {error:.4f}"
    assert budget.evaluate is not None
    before, after = budget.evaluate(job.model), budget.evaluate(model)
    return before - after <= budget.max_drop, math.nan, f"{after:g} instead of {before:g}"
