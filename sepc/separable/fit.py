"""Fitting: the factors of a form that come nearest to a convolution, in the metric of what it reads.

With W [O, I·taps] the weight and S the second moment of centred input patches, the error of an approximation Ŵ is the
mean square of what it does to results,

    ‖W − Ŵ‖²_S = tr (W − Ŵ) S (W − Ŵ)ᵀ                   S = 1 where nothing is known of the inputs

A form gives Ŵ = Q Bᵀ with B(θ) made of all factors but the last (`sepc.separable.forms`). For a given B the best Q, and
what remains of the error as a function of θ alone, are

    Q = W S B (BᵀSB)⁻¹,        f(θ) = tr W S Wᵀ − tr Q BᵀS Wᵀ,        ∂f/∂B = −2 S (W − Q Bᵀ)ᵀ Q

as Q's own derivative vanishes where Q is optimal. f is minimised by L-BFGS; S enters by the product S·B only, once per
step. A little of the identity is added to BᵀSB, whose columns B are of length 1 at the start, so that it can be
factorised when two components come to lie in parallel. The last step is in float64, and makes the factors of like size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from sepc.separable.forms import Form
from sepc.separable.geometry import Geometry

RIDGE: Final = 1e-5
FINAL_RIDGE: Final = 1e-11
# Of the length of the factors at the start: components that begin alike would stay so.
NOISE: Final = 0.02
HISTORY: Final = 10
EVALUATIONS_PER_STEP: Final = 1.25


@dataclass(frozen=True)
class Approximation:
    """A fit.

    Attributes:
        factors: weights of the form's layers, for all groups, in float64.
        weight: the weight that they stand for.
        square_error: ‖W − Ŵ‖² in the metric, over ‖W‖².
    """

    factors: tuple[torch.Tensor, ...]
    weight: torch.Tensor
    square_error: float

    @property
    def error(self) -> float:
        """The relative error of results, as a root of mean squares."""
        return math.sqrt(self.square_error)


def fit(
    form: Form,
    whole: Geometry,
    rank: int,
    weight: torch.Tensor,
    metric: torch.Tensor | None = None,
    *,
    steps: int = 40,
    seed: int = 0,
) -> Approximation:
    """The factors of `form` with `rank` that are nearest to `weight` [O, I of a group, k...].

    Args:
        form: what to take it apart into.
        whole: the convolution.
        rank: per group.
        weight: what to come near to.
        metric: S [groups, I·taps, I·taps] of a group's patches; without it all inputs count alike.
        steps: of L-BFGS; 0 leaves all factors but the last at truncated singular value decompositions.
        seed: of the noise at the start.
    """
    one = replace(whole, in_channels=whole.group_inputs, out_channels=whole.group_outputs, groups=1)
    by_group: list[list[torch.Tensor]] = []
    left = scale = 0.0
    generator = torch.Generator().manual_seed(seed)
    for group, part in enumerate(weight.chunk(whole.groups)):
        problem = _Problem.of(form, one, part, None if metric is None else metric[group])
        own, part_left, part_scale = _fit_group(problem, rank, steps, generator)
        by_group.append(own)
        left, scale = left + part_left, scale + part_scale
    factors = tuple(torch.cat(parts) for parts in zip(*by_group, strict=True))
    return Approximation(factors, compose(form, whole, factors), left / scale if scale else 0.0)


def compose(form: Form, whole: Geometry, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weight of `whole` that `factors` stand for."""
    one = replace(whole, in_channels=whole.group_inputs, out_channels=whole.group_outputs, groups=1)
    groups = zip(*(factor.chunk(whole.groups) for factor in factors), strict=True)
    return torch.cat([_product(form.basis(one, first), last) for *first, last in groups]).reshape(whole.weight_shape)


def _product(basis: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Q Bᵀ [O, I·taps]."""
    rows: torch.Tensor = last.reshape(len(basis), -1, basis.shape[2]) @ basis.transpose(1, 2)
    return rows.flatten(0, 1)


@dataclass(frozen=True)
class _Problem:
    """One group: a weight [O, I, k...], S [I·taps, I·taps] or none for the identity, and S Wᵀ [I·taps, O]."""

    form: Form
    whole: Geometry
    weight: torch.Tensor
    metric: torch.Tensor | None
    target: torch.Tensor

    @staticmethod
    def of(form: Form, whole: Geometry, weight: torch.Tensor, metric: torch.Tensor | None) -> _Problem:
        weight, metric = weight.detach().double(), None if metric is None else metric.double()
        columns = weight.flatten(1).T
        return _Problem(form, whole, weight, metric, columns if metric is None else metric @ columns)

    def through(self, columns: torch.Tensor) -> torch.Tensor:
        """S times `columns` [..., I·taps, n]."""
        return columns if self.metric is None else self.metric @ columns

    def targets(self, groups: int) -> torch.Tensor:
        """S Wᵀ [groups, I·taps, O/groups]."""
        return self.target.reshape(len(self.target), groups, -1).movedim(1, 0)

    def float(self) -> _Problem:
        metric = None if self.metric is None else self.metric.float()
        return replace(self, weight=self.weight.float(), metric=metric, target=self.target.float())


def _fit_group(
    problem: _Problem, rank: int, steps: int, generator: torch.Generator
) -> tuple[list[torch.Tensor], float, float]:
    """The factors, what remains of the square error, and the square norm of the weight."""
    form, whole, weight = problem.form, problem.whole, problem.weight
    rows = weight.flatten(1)
    scale = float((rows * problem.target.T).sum())
    best = form.best(weight, rows @ problem.target, rank)
    first = best or form.start(weight, rank)
    if best is None and steps and scale > 0:
        first = _descend(problem.float(), first, scale, steps, generator)
    # Lengths of factors cancel out of the product, and the last one's follows.
    first = [factor / _lengths(factor).clamp_min(torch.finfo(torch.float64).tiny) for factor in first]
    basis = form.basis(whole, first)
    last = _last_factor(problem, basis)
    rest = rows - _product(basis, last)
    left = float((rest * problem.through(rest.T).T).sum())
    factors = [*first, last.reshape(form.of_one_group(whole, rank)[-1].weight_shape)]
    return balance(factors), max(0.0, left), scale


def _lengths(factor: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(factor, dim=tuple(range(1, factor.dim())), keepdim=True)
    return lengths


def balance(factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`factors` with the same product, their mean squares made alike: none overflows, or is lost in rounding."""
    sizes = [float(factor.square().mean().sqrt()) for factor in factors]
    if not all(0 < size < math.inf for size in sizes):
        return list(factors)
    mean = math.exp(sum(map(math.log, sizes)) / len(sizes))
    return [factor * (mean / size) for factor, size in zip(factors, sizes, strict=True)]


def _last_factor(problem: _Problem, basis: torch.Tensor) -> torch.Tensor:
    """Q [g, O/g, m] for the `basis` [g, I·taps, m]."""
    gram = basis.transpose(1, 2) @ problem.through(basis)
    right = basis.transpose(1, 2) @ problem.targets(len(basis))
    return _solve(gram, right, FINAL_RIDGE).transpose(1, 2)


def _solve(matrix: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
    """(matrix + ridge·mean diagonal)⁻¹ right, for semidefinite [..., m, m]; more is added where that is singular."""
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(torch.finfo(matrix.dtype).tiny)
    identity = torch.eye(matrix.shape[-1]).to(matrix)
    while True:
        root, failed = torch.linalg.cholesky_ex(matrix + ridge * size * identity)
        if not failed.any():
            return torch.cholesky_solve(right, root)
        ridge *= 10


def _descend(
    problem: _Problem, first: Sequence[torch.Tensor], scale: float, steps: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """`first` after so many steps of L-BFGS, from a little noise; never worse than without."""
    form, whole = problem.form, problem.whole
    start = [_normalized(factor.float()) for factor in first]
    noisy = [
        factor + NOISE * _lengths(factor) * torch.randn(factor.shape, generator=generator) / factor[0].numel() ** 0.5
        for factor in start
    ]
    _scale_columns(problem, noisy)
    parameters = [factor.contiguous().requires_grad_() for factor in noisy]
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=math.ceil(steps * EVALUATIONS_PER_STEP),
        history_size=HISTORY,
        tolerance_grad=0.0,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        basis = form.basis(whole, parameters)
        value, gradient = objective(problem, basis.detach(), scale)
        torch.autograd.backward(basis, gradient)
        return value

    optimizer.step(closure)
    found = [parameter.detach() for parameter in parameters]
    values = [objective(problem, form.basis(whole, one), scale)[0] for one in (start, found)]
    best = found if values[1] < values[0] and all(bool(one.isfinite().all()) for one in found) else start
    return [factor.double() for factor in best]


def _normalized(factor: torch.Tensor) -> torch.Tensor:
    lengths = _lengths(factor)
    return torch.where(lengths > 0, factor / lengths.clamp_min(torch.finfo(factor.dtype).tiny), factor)


def _scale_columns(problem: _Problem, factors: Sequence[torch.Tensor]) -> None:
    """Scale the first factor so that columns of the basis are of length 1 in the metric, on average."""
    basis = problem.form.basis(problem.whole, factors)
    square = float((basis * problem.through(basis)).sum(1).mean())
    if square > 0:
        factors[0].div_(math.sqrt(square))


def objective(problem: _Problem, basis: torch.Tensor, scale: float) -> tuple[float, torch.Tensor]:
    """f over `scale` for the `basis`, and its derivative by that."""
    through, targets = problem.through(basis), problem.targets(len(basis))
    right = basis.transpose(1, 2) @ targets
    gram = basis.transpose(1, 2) @ through
    root, failed = torch.linalg.cholesky_ex(gram + RIDGE * torch.eye(basis.shape[2]).to(gram))
    if failed.any():
        return math.inf, torch.zeros_like(basis)
    last = torch.cholesky_solve(right, root)  # Qᵀ [g, m, O/g]
    value = 1 - float((last * right).sum(dtype=torch.float64)) / scale
    gradient = targets @ last.transpose(1, 2) - through @ (last @ last.transpose(1, 2))
    return value, gradient * (-2 / scale)
