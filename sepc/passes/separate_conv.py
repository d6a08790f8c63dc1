"""separate-conv: a convolution that is separable, or of low rank, becomes what it is a product of.

Pattern: a convolution with a constant weight, in float32, not depthwise. Equation: with one of the
forms of `sepc.separable.forms`, of a small rank, its weight is a product of factors, and

    W∗x + b  =  F₃∗(F₂∗(F₁∗x)) + b                     of two or three factors, the taps in one or two of them

Preconditions. The product is the weight up to rounding: the error that is left, relative to the weight, is at most
`sepc.separable.diagonalize.EXACT`. And the factors are predicted to be faster than the convolution, each alone with an
activation behind it, as `sepc.passes.predict` has it. With `max_error` above 0, factors may be so far from the weight
instead, relative to its norm: that changes results, by how much nobody has looked at (`sepc.separate` does).

    conv3x3 (64 → 64), of 24 components      becomes    conv1x1 (64 → 24) → depthwise 3x3 → conv1x1 (24 → 64)
    conv3x3 (64 → 64), each 3x3 of rank one  becomes    conv3x1 → conv1x3
    conv3x3 (64 → 64), half of whose inputs have weights of zero
                                             becomes    conv1x1 (64 → 32) → conv3x3 (32 → 64)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sepc.ir.layers import Conv
from sepc.ir.ops import constant, dtype, is_constant, shape
from sepc.ir.types import fake_mode
from sepc.passes.manager import PassContext
from sepc.passes.predict import sequence_us
from sepc.passes.rewriter import Rejection, Rewriter, replace
from sepc.separable.diagonalize import EXACT
from sepc.separable.exact import exact_forms, largest_rank
from sepc.separable.fit import Approximation, fit
from sepc.separable.forms import FORMS
from sepc.separable.geometry import Geometry

if TYPE_CHECKING:
    from torch import fx

# What a rewrite has to gain, predicted: a layer more has costs that the prediction does not see.
GAIN: Final = 0.95
# Of the descent, and how ranks are tried, where factors need not be exact.
STEPS: Final = 20
RANK_RATIO: Final = 0.8


@dataclass(frozen=True)
class SeparateConv:
    """The pass.

    Attributes:
        max_error: how far factors may be from a weight, relative to its norm; 0 for rounding only.
    """

    name: ClassVar[str] = "separate-conv"
    max_error: float = 0.0

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Take apart what it can in `graph_module`; returns whether it changed."""
        changed, mode = False, fake_mode(graph_module)
        for node in list(graph_module.graph.nodes):
            if not is_dense(node):
                continue
            found = self._choose(node, graph_module, context)
            if found is None:
                continue
            build = Rewriter(graph_module, self.name, mode, node, (node,))
            rejection = self._obstacle(found) or rewrite(node, found, build)
            changed |= rejection is None
            message = rejection.reason if rejection else f"{found}, {found.fitted.error:.1e} off"
            context.note(self.name, node, message, taken=rejection is None, times_us=found.times_us)
        return changed

    def _choose(self, node: fx.Node, graph_module: fx.GraphModule, context: PassContext) -> _Found | None:
        """The form that is predicted to be the fastest; None where there is none, as for most convolutions."""
        conv = Conv.of(node)
        sizes = conv.kernel, conv.stride, conv.padding, conv.dilation
        whole = Geometry(conv.in_channels, conv.out_channels, *sizes, conv.groups)
        weight, image = constant(graph_module, conv.weight), shape(conv.input)
        options = list(self._options(whole, weight))
        if not options:
            return None
        machine, threads = context.machine_for(self.name), context.threads
        dense_us = sequence_us((whole,), image, machine, threads, context.element)
        times_us = {
            one: sequence_us(FORMS[one[0]].factors(whole, one[1]), image, machine, threads, context.element)
            for one in options
        }
        form, rank = min(times_us, key=lambda one: times_us[one])
        fitted = fit(FORMS[form], whole, rank, weight, steps=STEPS if self.max_error else 0)
        return _Found(form, rank, fitted, whole, (dense_us, times_us[form, rank]))

    def _obstacle(self, found: _Found) -> Rejection | None:
        """Why a form does not replace a convolution, if it does not."""
        if found.fitted.error > max(EXACT, self.max_error):
            return Rejection(f"{found} is {found.fitted.error:.1e} off")
        before_us, after_us = found.times_us
        if after_us > GAIN * before_us:
            return Rejection(f"{found} is predicted to take {after_us:.1f} µs instead of {before_us:.1f}")
        return None

    def _options(self, whole: Geometry, weight: torch.Tensor) -> Iterator[tuple[str, int]]:
        if not self.max_error:
            yield from exact_forms(whole, weight)
            return
        for name, form in FORMS.items():
            smallest, rank = 0, largest_rank(name, whole)
            while rank and fit(form, whole, rank, weight, steps=STEPS).error <= self.max_error:
                smallest, rank = rank, int(rank * RANK_RATIO)
            if smallest:
                yield name, smallest


def is_dense(node: fx.Node) -> bool:
    """Whether `node` is a convolution of several channels with a weight that is known, in float32."""
    if not Conv.matches(node) or dtype(node) != torch.float32:
        return False
    conv = Conv.of(node)
    return (
        not conv.is_depthwise
        and shape(conv.weight)[1] > 1
        and is_constant(conv.weight)
        and len(shape(conv.input)) == len(conv.kernel) + 2
    )


@dataclass(frozen=True)
class _Found:
    """A form of a convolution, and predicted times in microseconds before and after."""

    form: str
    rank: int
    fitted: Approximation
    whole: Geometry
    times_us: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.form} of rank {self.rank}"


def rewrite(node: fx.Node, found: _Found, build: Rewriter) -> Rejection | None:
    """Replace the convolution `node` by its factors; the last one has its bias."""
    conv = Conv.of(node)
    geometries = FORMS[found.form].factors(found.whole, found.rank)
    stem = str(conv.weight.target)

    def factors() -> fx.Node:
        value = conv.input
        for index, (one, factor) in enumerate(zip(geometries, found.fitted.factors, strict=True)):
            weight = build.constant(f"{stem}_factor_{index}", factor.float().contiguous())
            bias = conv.bias if index == len(geometries) - 1 else None
            assert not isinstance(one.padding, str), "graphs have numbers"
            options = (list(one.stride), list(one.padding), list(one.dilation), one.groups)
            value = build.call(Conv.targets[len(one.kernel) - 1], value, weight, bias, *options)
        return value

    return replace(node, build, factors)
