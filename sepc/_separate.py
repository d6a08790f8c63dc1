"""`sepc.separate`: a network's dense convolutions made separable, within a budget of accuracy or of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import nn

from sepc.errors import InputError
from sepc.separable.forms import FORMS
from sepc.separable.result import Separation
from sepc.separable.twins import KEPT_BYTES
from sepc.separation.budget import Budget
from sepc.separation.data import Source, as_inputs, count_inputs, in_batches
from sepc.separation.job import Job
from sepc.separation.menus import allocations
from sepc.separation.search import search
from sepc.target import Target

DEFAULT_FORMS: Final = ("bottleneck", "spatial", "channels", "output-channels")


def separate(
    model: nn.Module,
    *,
    calibration: Source | None = None,
    target: str | Target = "native",
    max_error: float | None = None,
    speedup: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    max_drop: float | None = None,
    distill_steps: int = 0,
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
    num_threads: int | None = None,
    calibration_size: int = 512,
    forms: Sequence[str] = DEFAULT_FORMS,
    steps: int = 40,
    seed: int = 0,
    kept_bytes: int = KEPT_BYTES,
) -> Separation:
    """Replace convolutions of `model` by separable or low-rank ones that are faster on `target`, within a budget.

    Exactly one budget is given: `max_error`; `speedup`; or `evaluate` with `max_drop`. Within it, forms and ranks are
    chosen for all layers at once, by predicted time and error. If none of it is both faster and within the budget, the
    model comes back as it was, and the result says why.

    Args:
        model: a module in eval mode that takes tensors, with parameters on the CPU. It is not changed.
        calibration: unlabelled inputs, some hundred: a tensor of them, or an iterable of batches (a DataLoader), each a
            tensor, or a tuple that begins with all that the model takes; what follows, as labels, is left out. Without
            any, weights are approximated for their own sake, which loses far more accuracy.
        target: what it is to be fast on, as for `sepc.compile`.
        max_error: the largest relative error of the model's results on the calibration data, as a root of mean
            squares; without calibration data, the largest root of the sum of squares of the layers' errors.
        speedup: how many times as fast the model shall be, at the least error: measured, if the target runs here.
        evaluate: the user's own figure of merit of a model, of which more is better.
        max_drop: how much of that may be lost.
        distill_steps: so many steps of training against the original, on all of the calibration data, without labels:
            for a loss that a fit alone cannot avoid. It keeps the best state, judged by data that was held out; Ctrl-C
            ends it with the best so far. With a budget of accuracy, what is beyond it as fitted is distilled, and
            tried again.
        example_inputs: an input, or several, of the shape that it is to be fast for; by default one calibration input.
        num_threads: threads of a call; by default those of ``torch.get_num_threads()``.
        calibration_size: how many calibration inputs layers are fitted to.
        forms: which forms may be used, of `sepc.separable.forms`.
        steps: of the descent for each layer.
        seed: of everything that is random.
        kept_bytes: of values inside the model that are kept from one layer's fit to the next; with fewer, more is
            computed anew, and nothing else changes.

    Raises:
        InputError: no budget or several, or inputs that do not fit. ModelError: the model cannot be captured.
    """
    budget = Budget.of(max_error, speedup, evaluate, max_drop)
    unknown = [name for name in forms if name not in FORMS]
    if unknown:
        raise InputError(f"There is no form {unknown[0]!r}", where="forms", fix=f"choose among {', '.join(FORMS)}")
    _check_distillation(distill_steps, calibration)
    batches = in_batches(calibration, calibration_size, count_inputs(model, example_inputs))
    if example_inputs is not None:
        example = as_inputs(example_inputs, "example_inputs")
    elif batches:
        example = tuple(one[:1] for one in batches[0])
    else:
        raise InputError("There is no input to be fast for", fix="give calibration data, or example_inputs")
    threads = num_threads or torch.get_num_threads()
    with torch.no_grad():
        job = Job(
            model,
            batches,
            example,
            Target.parse(target),
            threads,
            tuple(forms),
            steps,
            seed,
            calibration,
            distill_steps,
            kept_bytes,
        )
        return search(job, allocations(job), budget)


def _check_distillation(steps: int, calibration: Source | None) -> None:
    """Refuse what would be found out only after minutes."""
    if steps < 0:
        raise InputError(f"distill_steps is {steps}", fix="give a number of steps, or 0 for none")
    if steps and calibration is None:
        raise InputError("There is nothing to distil with", where="distill_steps", fix="give calibration data")
    if steps and isinstance(calibration, Iterator):
        raise InputError(
            "The calibration data can be read only once, and distillation reads it time and again",
            where="calibration",
            why=f"it is a {type(calibration).__name__}",
            fix="give a tensor, a list of batches, or a DataLoader",
        )
