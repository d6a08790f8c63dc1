"""Distillation: all weights of a separated model trained to do what the original does, on data without labels.

For inputs x let f be results, and g_ℓ what each replaced layer ℓ gives behind its normalisation's scale; primes are the
separated model's. Each is divided by its variance in the original, so that none depends on units, and

    loss  =  ‖f′ − f‖² / var f  +  λ · mean over ℓ of ‖g′_ℓ − g_ℓ‖² / var g_ℓ

is minimised by Adam, with a rate in proportion to the error at the start, which rises for some steps, and then falls to
zero in the shape of a cosine. Both models
stay in evaluation mode: normalisations keep their means and variances, whose place the biases can take, so that what is
trained is what will run. Every so often the first term is looked at on inputs that were held out, and the best state
there was, the one before the first step among them, is what comes back: also if the user interrupts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from torch import nn
from tqdm import tqdm

from sepc.separable.plan import Plan
from sepc.separation.data import Inputs
from sepc.separation.student import Student

logger = logging.getLogger(__name__)

# The largest rate for each unit of error at the start: where little is off, large steps do harm first, and then there
# is no time to make up for it.
RATE: Final = 0.01
LARGEST_ERROR: Final = 0.5
WARM_UP_SHARE: Final = 0.05
# How often the state is looked at.
LOOKS: Final = 20


@dataclass(frozen=True)
class Distillation:
    """What came of it.

    Attributes:
        steps: how many were made. seconds: that they took.
        error: of the results on inputs that were held out, relative to their deviation, before and after.
        interrupted: whether the user ended it.
    """

    steps: int
    seconds: float
    error: tuple[float, float]
    interrupted: bool

    def __str__(self) -> str:
        """In words."""
        steps = f"{self.steps} steps in {self.seconds:.0f} s{', interrupted' if self.interrupted else ''}"
        return f"{steps}: error on held-out data {self.error[0]:.4f} → {self.error[1]:.4f}"


def distill(
    original: nn.Module,
    plan: Plan,
    scales: Mapping[str, torch.Tensor],
    held_out: Sequence[Inputs],
    batches: Iterator[Inputs],
    steps: int,
    seed: int,
) -> tuple[Plan, Distillation]:
    """A plan whose model is nearer to `original` than that of `plan`, or as near.

    Args:
        original: in evaluation mode.
        plan: what to begin with.
        scales: of each layer, what its results are multiplied with in what follows, [O].
        held_out: inputs that the results are judged by.
        batches: inputs to train with, a batch for each step.
        steps: how many; at a KeyboardInterrupt it ends before.
        seed: of PyTorch's generator, by which a DataLoader shuffles. The caller's generator is left as it was.
    """
    begin_s, done, interrupted = time.perf_counter(), 0, False
    with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False), torch.enable_grad():
        torch.manual_seed(seed)
        student = Student(original, plan, {path: scales[path] for path in plan.layers}, held_out)
        best = before = student.error()
        state = student.state()
        optimizer = torch.optim.Adam(student.parameters, RATE * min(before, LARGEST_ERROR))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
        try:
            with tqdm(total=steps, desc="distillation", unit=" steps", disable=None) as bar:
                for inputs in islice(batches, steps):
                    optimizer.zero_grad()
                    loss = student.loss(inputs)
                    loss.backward()  # type: ignore[no-untyped-call]
                    if loss.isfinite():
                        optimizer.step()
                    schedule.step()
                    done += 1
                    if done == steps or done % max(1, steps // LOOKS) == 0:
                        now = student.error()
                        if now < best:
                            state, best = student.state(), now
                        bar.set_postfix_str(f"error {before:.4f} → {best:.4f}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            interrupted = True
    found = Distillation(done, time.perf_counter() - begin_s, (before, best), interrupted)
    logger.info("distillation: %s", found)
    return plan.with_weights(state), found


def rate_share(step: int, steps: int) -> float:
    """The rate at `step`, in proportion to the largest."""
    rising = (step + 1) / max(1.0, WARM_UP_SHARE * steps)
    return min(1.0, rising) * 0.5 * (1 + math.cos(math.pi * step / steps))
