"""A model compiled for one set of arguments, as it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sepc.runtime.executable import AnyExecutable
from sepc.runtime.report import RegionReport
from sepc.runtime.signature import Results, Signature


@dataclass(frozen=True)
class Description:
    """What is known of a specialisation beside its program.

    Attributes:
        signature: the calls that it is for.
        order: per input of the program the number of the argument's tensor that it takes.
        results: how the user's result is made of the program's.
        threads: how many threads its work is divided for, the most that may run it.
        optimize: what it was optimised for, as `sepc.compile` takes it.
        regions: its regions, in execution order.
    """

    signature: Signature
    order: tuple[int, ...]
    results: Results
    threads: int
    optimize: str
    regions: tuple[RegionReport, ...]


@dataclass(frozen=True)
class Specialization:
    """A model compiled for one signature and number of threads."""

    description: Description
    executable: AnyExecutable

    @property
    def key(self) -> tuple[int, tuple[Any, ...]]:
        """What a call is looked up by: the number of threads, and its `call_key`."""
        return self.description.threads, self.description.signature.key

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The model's result for the tensors among its arguments, whose strides are those it was compiled for."""
        description = self.description
        inputs = [tensors[index] for index in description.order]
        return description.results.unflatten(self.executable.run(inputs, description.threads))

    def profile(self, tensors: Sequence[torch.Tensor], repeats: int) -> dict[str, float]:
        """Median time of each region over `repeats` runs, in microseconds, by the region's name."""
        inputs = [tensors[index] for index in self.description.order]
        return self.executable.profile(inputs, self.description.threads, repeats)
