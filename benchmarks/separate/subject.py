"""One trained network, and what is asked of every smaller one in its place: its time, and its accuracy."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.separate.data import Images
from benchmarks.separate.latency import compiled
from benchmarks.separate.networks import accuracy
from benchmarks.separate.results import DENSE, Row
from sepc.separation.latency import Compiled, Timing, timing


@dataclass(frozen=True)
class Subject:
    """A trained network.

    Attributes:
        network, seed, model: which.
        unlabelled: training images, in one tensor. images: how many of them are for calibration.
        test: all test images.
        threads: for the compiled networks.
        rounds: turns of either network when latency is measured.
    """

    network: str
    seed: int
    model: nn.Module
    unlabelled: torch.Tensor
    images: int
    test: Images
    threads: int
    rounds: int

    @property
    def calibration(self) -> torch.Tensor:
        """The images that every method may use."""
        return self.unlabelled[: self.images]

    @property
    def example(self) -> torch.Tensor:
        """What it is timed on: one image."""
        return self.test.images[:1]

    @cached_property
    def dense(self) -> Compiled:
        """The network as it was, compiled."""
        return compiled(self.model, self.example, self.threads)

    def timing(self, model: nn.Module, rounds: int | None = None) -> Timing:
        """The time of `model` against the dense network's."""
        reduced = compiled(model, self.example, self.threads)
        return timing(self.dense, reduced, (self.example,), rounds or self.rounds)

    @cached_property
    def multiply_adds(self) -> int:
        """Of the dense network, for one image."""
        return multiply_adds(self.model, self.example)

    def row(
        self, method: str, wanted: float, model: nn.Module, timing: Timing, seconds: float, details: str = ""
    ) -> Row:
        """What is to be told of `model`."""
        fewer = self.multiply_adds / multiply_adds(model, self.example)
        which = self.network, self.seed, self.threads, method, wanted
        times = timing.speedup, timing.dense_us, timing.reduced_us
        return Row(*which, *times, accuracy(model, self.test), fewer, seconds, details)

    def dense_row(self) -> Row:
        """The network as it was."""
        which = self.network, self.seed, self.threads, DENSE, 1.0
        return Row(*which, 1.0, 0.0, 0.0, accuracy(self.model, self.test), 1.0, 0.0, "")


def multiply_adds(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of `model` for `x`, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops()) // 2


def with_means_of(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """A copy of `model` whose batch normalisations have the means and variances of `images`."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 1.0  # All of it from this one batch.
    with torch.no_grad():
        result(images)
    return result.eval()
