"""Layer by layer through a network: what each reads and should give, and the factors that come nearest to that.

A layer of the rewritten network reads x̂, which differs from the x that it was trained for, since layers before it are
approximations. It is fitted to what it should give for that x̂: the original's result y for x, behind its normalisation
and, where it is a summand, with what the other summand is off by,

    t = y + (skip − skip̂)

so that errors made earlier are made up for where a layer can. The weight that gives t best from x̂ takes the place of
the original's, and the form is fitted to that one in the metric of x̂ (`sepc.separable.statistics`,
`sepc.separable.fit`). Layers that stay are fitted as well (`sepc.separable.refit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from sepc.ir.ops import constant
from sepc.progress import progress
from sepc.separable.fit import fit
from sepc.separable.forms import FORMS
from sepc.separable.layers import DenseLayer
from sepc.separable.plan import Plan, Replacement
from sepc.separable.refit import Kept, Weights, refit
from sepc.separable.statistics import Sampler, Statistics
from sepc.separable.twins import Pair, Twins


@dataclass(frozen=True)
class Option:
    """A form with a rank."""

    form: str
    rank: int

    def __str__(self) -> str:
        return f"{self.form} {self.rank}"


def scaled_weight(layer: DenseLayer, graph_module: fx.GraphModule) -> torch.Tensor:
    """The weight of `layer` in float64 with the normalisation's scale in it: what counts for what follows."""
    weight = constant(graph_module, layer.conv.weight).double()
    return weight * layer.scale.reshape(-1, *[1] * (weight.dim() - 1))


def fit_weights(layer: DenseLayer, option: Option, graph_module: fx.GraphModule, steps: int, seed: int) -> Replacement:
    """The factors nearest to the weight of `layer`, where nothing is known of its inputs."""
    found = fit(
        FORMS[option.form], layer.geometry, option.rank, scaled_weight(layer, graph_module), steps=steps, seed=seed
    )
    node = layer.conv.bias
    bias = None if node is None else constant(graph_module, node)
    return Replacement(option.form, option.rank, _unscaled(layer, found.factors), bias, found.error)


@dataclass(frozen=True)
class Regression:
    """What a layer should do: moments of inputs and targets, the best weight there is, and a metric for others."""

    layer: DenseLayer
    moments: Statistics
    weight: torch.Tensor
    metric: torch.Tensor

    @staticmethod
    def of(layer: DenseLayer, moments: Statistics, graph_module: fx.GraphModule) -> Regression:
        """Of `layer` with these moments."""
        best = moments.best_weight(scaled_weight(layer, graph_module))
        return Regression(layer, moments, best, moments.metric())

    def fit(self, option: Option, steps: int, seed: int) -> Replacement:
        """The factors that give the targets best."""
        layer, form = self.layer, FORMS[option.form]
        found = fit(form, layer.geometry, option.rank, self.weight, self.metric, steps=steps, seed=seed)
        bias = (self.moments.bias(found.weight) - layer.shift) / layer.scale
        factors = _unscaled(layer, found.factors)
        return Replacement(option.form, option.rank, factors, bias.float(), self.moments.error(found.weight))


def _unscaled(layer: DenseLayer, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    *first, last = factors
    last = last / layer.scale.reshape(-1, *[1] * (last.dim() - 1))
    return tuple(factor.float().contiguous() for factor in (*first, last))


def walk(
    twins: Twins, layers: Sequence[DenseLayer], visit: Callable[[DenseLayer, Statistics], None], seed: int
) -> None:
    """Give `visit` the moments of each layer in turn, nothing being replaced."""
    generator = torch.Generator().manual_seed(seed)
    for layer in progress(layers, "fits of layers"):
        visit(layer, gather(twins, layer, generator))


def gather(twins: Twins, layer: DenseLayer, generator: torch.Generator) -> Statistics:
    """The moments of what `layer` reads in the second network, and of what it should give there."""
    sampler = Sampler(layer.geometry, twins.images, layer.image_size, generator)
    for pair in twins:
        places = sampler.places()
        sampler.add(pair.second(layer.conv.input), _target(pair, layer, places), places)
    return sampler.statistics()


def _target(pair: Pair, layer: DenseLayer, places: torch.Tensor) -> torch.Tensor:
    """What `layer` should give at `places`."""
    result = _at(pair.first(layer.result), places)
    if layer.skip is None:
        return result
    skip, own = pair.first(layer.skip), pair.second(layer.skip)
    return result if skip is own else result + _at(skip, places) - _at(own, places)


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return values.flatten(2)[:, :, places]


def fit_in_turn(
    twins: Twins,
    layers: Sequence[DenseLayer],
    graph_module: fx.GraphModule,
    options: Mapping[str, Option],
    steps: int,
    seed: int,
    kept: Sequence[Kept] = (),
) -> Plan:
    """Fit the layers that have an option, in the order in which they run, each to what those before it leave to do.

    Those that are `kept`, which have none, are fitted as they are, where something before them was replaced.
    """
    found: dict[str, Replacement] = {}
    weights: Weights = {}
    generator = torch.Generator().manual_seed(seed)
    chosen = [one for one in layers if one.path in options]
    for stop in progress(_merged(chosen, kept, graph_module), "fits of layers"):
        if isinstance(stop, DenseLayer):
            moments = gather(twins, stop, generator)
            found[stop.path] = Regression.of(stop, moments, graph_module).fit(options[stop.path], steps, seed)
            twins.replace(stop.node, found[stop.path].build(stop.geometry))
        elif twins.differ_at(stop.node):
            weights |= refit(stop, twins, graph_module, partial(gather, twins, generator=generator), generator)
    return Plan(found, weights)


def _merged(
    chosen: Sequence[DenseLayer], kept: Sequence[Kept], graph_module: fx.GraphModule
) -> list[DenseLayer | Kept]:
    """All in one order: that of `chosen`, with each of `kept` before the first of them that comes after it."""
    position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    merged: list[DenseLayer | Kept] = []
    left = sorted(kept, key=lambda one: position[one.node])
    for layer in chosen:
        before = [one for one in left if position[one.node] < position[layer.node]]
        merged += [*before, layer]
        left = left[len(before) :]
    return [*merged, *left]
