"""A process for each model and number of threads.

Thread pools are sized once in a process's life, and a runner that crashes takes only its own row with it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sepc.bench.measure import ModelResult, PeerResult, describe, inputs_text, measure
from sepc.bench.peers import ENVIRONMENTS, NATIVE, Job
from sepc.errors import SepcError


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        model: its name. load: makes it, in eval mode, with its inputs; another process has to be able to import that.
        peers: which runners. rounds: how many turns each gets. threads, isa: as for a `Job`.
    """

    model: str
    load: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]
    peers: Sequence[str]
    rounds: int
    threads: int = 1
    isa: str = NATIVE


def run_in_process(task: Task) -> ModelResult:
    """Measure in a new process; if that dies, a result that says so for every runner. Raises what `load` explains."""
    context = multiprocessing.get_context("spawn")
    variables = {"OMP_NUM_THREADS": str(task.threads), **ENVIRONMENTS[task.isa]}
    with _environment(variables), ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure_task, task).result()
        except SepcError:
            raise
        except BrokenProcessPool:
            failure = "the process died, so no runner has figures; --peers can leave out the one that crashed it"
        except Exception as error:  # for example a model that does not exist, or does not accept this size
            failure = describe(error)
    peers = {name: PeerResult(failure=failure) for name in task.peers}
    return ModelResult(task.model, "", task.threads, peers, task.isa)


def measure_task(task: Task) -> ModelResult:
    """Load and measure one model in this process, whose number of threads this fixes."""
    torch.set_num_threads(task.threads)
    module, inputs = task.load()
    results = measure(Job(module, inputs, task.threads, task.isa), task.peers, task.rounds)
    return ModelResult(task.model, inputs_text(inputs), task.threads, results, task.isa)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
