"""A model to be separated, for whom and with what data; and what follows from that: graph, layers, times, fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import fx, nn

from sepc.errors import InputError
from sepc.frontend.export import capture
from sepc.ir.ops import shape
from sepc.passes.canonicalize import Canonicalize
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE
from sepc.passes.predict import predicted_us, sequence_us
from sepc.separable.allocate import Allocation
from sepc.separable.calibrated import Option, fit_in_turn, fit_weights
from sepc.separable.forms import FORMS
from sepc.separable.layers import DenseLayer, find_layers
from sepc.separable.plan import Plan
from sepc.separable.twins import Twins
from sepc.target import Target

AS_IT_WAS: Final = Option("as it was", 0)
BATCH: Final = 64

Choice = Allocation[str, Option]


def in_batches(calibration: torch.Tensor | Iterable[Any] | None, size: int) -> list[torch.Tensor]:
    """The calibration inputs in batches of one size."""
    if calibration is None:
        return []
    found: list[torch.Tensor] = []
    for batch in [calibration] if isinstance(calibration, torch.Tensor) else calibration:
        one = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(one, torch.Tensor) or one.dim() < 2:
            why = f"there is a {type(one).__name__}"
            raise InputError("Calibration data must be batches of tensors", where="calibration", why=why)
        found.append(one.detach())
        if sum(map(len, found)) >= size:
            break
    if not sum(map(len, found)):
        raise InputError("There is no calibration data", where="calibration", why="it is empty")
    every = torch.cat(found)[:size]
    return list(torch.split(every[: max(len(every) // BATCH * BATCH, min(len(every), BATCH))], BATCH))


@dataclass(frozen=True)
class Job:
    """What is separated, and for what; and what follows from that."""

    model: nn.Module
    batches: Sequence[torch.Tensor]
    example: torch.Tensor
    target: Target
    threads: int
    forms: tuple[str, ...]
    steps: int
    seed: int

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The model for a calibration batch, or for the example where there are none."""
        return _canonical(self.model, self.batches[0] if self.batches else self.example)

    @cached_property
    def found(self) -> tuple[list[DenseLayer], dict[str, str]]:
        return find_layers(self.model, self.graph)

    @cached_property
    def images(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer's input for the example."""
        batch, *pixels = self.example.shape
        if self.batches and tuple(self.batches[0].shape[1:]) == tuple(pixels):
            sizes = {one.path: shape(one.conv.input)[1:] for one in self.found[0]}
            return {path: (batch, *size) for path, size in sizes.items()}
        layers, _ = find_layers(self.model, _canonical(self.model, self.example))
        return {one.path: shape(one.conv.input) for one in layers}

    @cached_property
    def dense_us(self) -> float:
        """Predicted time of the model as it is."""
        return self.predict(self.model)

    @cached_property
    def dense_times_us(self) -> dict[str, float]:
        """Predicted time of each layer as it is, alone."""
        return {one.path: self.layer_us(one, AS_IT_WAS) for one in self.found[0]}

    def predict(self, model: nn.Module) -> float:
        """Predicted time of a whole model for the example."""
        graph_module = capture(model, (self.example,)).graph_module
        context = PassContext(target=self.target, machine=self.target.machine, threads=self.threads)
        PassManager(PIPELINE).run(graph_module, context)
        return predicted_us(graph_module, self.target.machine, self.threads)

    def layer_us(self, layer: DenseLayer, option: Option) -> float:
        """Predicted time of a layer with `option`, alone."""
        whole = layer.geometry
        factors = (whole,) if option == AS_IT_WAS else FORMS[option.form].factors(whole, option.rank)
        return sequence_us(factors, self.images[layer.path], self.target.machine, self.threads)

    def predicted_for(self, choice: Choice) -> float:
        """Predicted time of the model with a choice for its layers."""
        return self.dense_us - sum(self.dense_times_us[path] - one.time_us for path, one in choice.chosen.items())

    def fit(self, choice: Choice, steps: int | None = None) -> Plan:
        """The plan that makes a choice true; with no `steps`, those of the job."""
        options = {path: one.item for path, one in choice.chosen.items() if one.item != AS_IT_WAS}
        layers = [one for one in self.found[0] if one.path in options]
        if steps == 0 or not self.batches:
            each = ((one.path, options[one.path]) for one in layers)
            by_path = {one.path: one for one in layers}
            count = self.steps if steps is None else steps
            return Plan({path: fit_weights(by_path[path], one, self.graph, count, self.seed) for path, one in each})
        twins = Twins(self.graph, self.batches)
        return Plan(fit_in_turn(twins, layers, self.graph, options, self.steps, self.seed))

    def error(self, model: nn.Module) -> float:
        """The relative error of `model` on the calibration data, as a root of mean squares."""
        off = size = 0.0
        for batch in self.batches:
            for expected, actual in zip(_tensors(self.model(batch)), _tensors(model(batch)), strict=True):
                off += float((actual - expected).double().square().sum())
                size += float(expected.double().square().sum())
        return math.sqrt(off / size) if size else math.nan


def _tensors(result: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [one for one in leaves if isinstance(one, torch.Tensor) and one.is_floating_point()]


def _canonical(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    graph_module = capture(model, (example,)).graph_module
    PassManager([Canonicalize()]).run(graph_module, PassContext())
    return graph_module
