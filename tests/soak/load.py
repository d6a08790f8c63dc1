"""Trials of load: many threads on one model, processes that are forked from it, and memory over many calls."""

from __future__ import annotations

import random
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import sepc
from tests.soak import forked
from tests.soak.outcome import Outcome

THREADS = 8
CALLS_PER_THREAD = 1000
CALLS_FOR_MEMORY = 10_000
GROWTH_BYTES = 1 << 20


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 24, 1)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(96, 10)).eval()


def threads(number: int, _: Path) -> Outcome:
    """8 threads with 1,000 calls each on one model, each call with an input of its own; the rate of calls."""
    outcome, compiled = Outcome(), sepc.compile(_model(), num_threads=1 + number % 2)
    inputs = [torch.randn(1, 3, 32, 32) for _ in range(3 * THREADS)]
    expected = [compiled(x) for x in inputs]

    def calls(index: int) -> int:
        generator, wrong = random.Random(f"{number} {index}"), 0
        for _ in range(CALLS_PER_THREAD):
            which = generator.randrange(len(inputs))
            wrong += not torch.equal(compiled(inputs[which]), expected[which])
        return wrong

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        wrong = sum(pool.map(calls, range(THREADS)))
    seconds = time.perf_counter() - started
    outcome.check(not wrong, f"threads {number}: {wrong} results are wrong")
    outcome.counts["calls of one model from 8 threads"] += THREADS * CALLS_PER_THREAD
    outcome.counts["milliseconds that these took"] += round(1000 * seconds)
    return outcome


def forks(number: int, _: Path) -> Outcome:
    """Processes that are forked, while OpenMP's threads and other calls run, call the model and PyTorch."""
    outcome, compiled = Outcome(), sepc.compile(_model(), num_threads=2)
    x, large = torch.randn(1, 3, 64, 64), torch.randn(400, 400)
    expected, product = compiled(x), large @ large

    def calls() -> int:
        torch.set_num_threads(1 + number % 2)
        right = all(torch.equal(compiled(x), expected) for _ in range(50))
        close = torch.allclose(large @ large, product, rtol=1e-3, atol=1e-3)
        return forked.RIGHT if right and close else forked.WRONG

    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            busy = [pool.submit(lambda: [compiled(x) for _ in range(100)]) for _ in range(2)]
            children = [forked.start(calls) for _ in range(4)]
            found = [forked.wait(child) for child in children]
            outcome.check(found == [forked.RIGHT] * 4, f"forks {number}: {found}")
            for one in busy:
                outcome.check(all(torch.equal(one, expected) for one in one.result()), f"beside forks {number}")
            outcome.counts["forked processes that call"] += 4
    return outcome


def memory(number: int, _: Path) -> Outcome:
    """10,000 calls take no more memory than 1,000."""
    torch.set_num_threads(1)
    outcome, compiled = Outcome(), sepc.compile(_model(), num_threads=1 + number % 2)
    inputs = [torch.randn(1, 3, 32, 32), torch.randn(2, 3, 24, 24).contiguous(memory_format=torch.channels_last)]

    def calls(count: int) -> int:
        for index in range(count):
            compiled(inputs[index % 2])
        return forked.pages()[1] * resource.getpagesize()

    before, after = calls(1000), calls(CALLS_FOR_MEMORY)
    outcome.check(after - before < GROWTH_BYTES, f"memory {number}: {after - before} bytes more after so many calls")
    outcome.counts["calls over which memory is watched"] += CALLS_FOR_MEMORY
    return outcome
