"""A model to be separated, for whom and with what data; and what follows from that: graph, layers, times, fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import fx, nn

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
from sepc.separable.refit import find_kept
from sepc.separable.twins import KEPT_BYTES, Twins
from sepc.separation.data import Inputs, Source, held_out, results_of, training_batches
from sepc.separation.distill import Distillation, distill
from sepc.target import Target

AS_IT_WAS: Final = Option("as it was", 0)

Choice = Allocation[str, Option]


@dataclass(frozen=True)
class Job:
    """What is separated, and for what; and what follows from that.

    Attributes:
        model: in evaluation mode. batches: that layers are fitted to. example: arguments that it is to be fast for.
        target, threads: where it runs. forms: which may be used. steps: of the fit of a layer. seed: of all randomness.
        source: the data to distil with. distill_steps: how long. kept_bytes: of values kept between layers.
    """

    model: nn.Module
    batches: Sequence[Inputs]
    example: Inputs
    target: Target
    threads: int
    forms: tuple[str, ...]
    steps: int
    seed: int
    source: Source | None = None
    distill_steps: int = 0
    kept_bytes: int = KEPT_BYTES

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
        if self.batches and all(
            one.shape[1:] == other.shape[1:] for one, other in zip(self.example, self.batches[0], strict=True)
        ):
            sizes = {one.path: shape(one.conv.input)[1:] for one in self.found[0]}
            return {path: (len(self.example[0]), *size) for path, size in sizes.items()}
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
        graph_module = capture(model, self.example).graph_module
        context = PassContext(target=self.target, machine=self.target.planned_for, threads=self.threads)
        PassManager(PIPELINE).run(graph_module, context)
        return predicted_us(graph_module, self.target.planned_for, self.threads)

    def layer_us(self, layer: DenseLayer, option: Option) -> float:
        """Predicted time of a layer with `option`, alone."""
        whole = layer.geometry
        factors = (whole,) if option == AS_IT_WAS else FORMS[option.form].factors(whole, option.rank)
        return sequence_us(factors, self.images[layer.path], self.target.planned_for, self.threads)

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
        twins = Twins(self.graph, self.batches, self.kept_bytes)
        kept = find_kept(self.model, self.graph, {one.path: one for one in self.found[0] if one.path not in options})
        return fit_in_turn(twins, layers, self.graph, options, self.steps, self.seed, kept)

    def distill(self, plan: Plan) -> tuple[Plan, Distillation]:
        """A plan whose model is nearer to the original, by training without labels."""
        assert self.source is not None, "there is data to distil with"
        judges = held_out(self.batches)
        generator = torch.Generator().manual_seed(self.seed)
        skipped = sum(len(one[0]) for one in judges)
        batches = training_batches(self.source, skipped, len(self.example), generator)
        scales = {one.path: one.scale for one in self.found[0]}
        return distill(self.model, plan, scales, judges, batches, self.distill_steps, self.seed)

    def error(self, model: nn.Module) -> float:
        """The relative error of `model` on the calibration data, as a root of mean squares."""
        off = size = 0.0
        for batch in self.batches:
            for expected, actual in zip(results_of(self.model(*batch)), results_of(model(*batch)), strict=True):
                off += float((actual - expected).double().square().sum())
                size += float(expected.double().square().sum())
        return math.sqrt(off / size) if size else math.nan


def _canonical(model: nn.Module, example: Inputs) -> fx.GraphModule:
    graph_module = capture(model, example).graph_module
    PassManager([Canonicalize()]).run(graph_module, PassContext())
    return graph_module
