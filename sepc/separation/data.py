"""Calibration data: unlabelled inputs of a model, as they come from the user, in batches of one size.

A model takes one tensor or several. Batches are tensors, or tuples that begin with as many as the model takes: what
follows, labels for instance, is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sepc.errors import InputError

BATCH: Final = 64
# Of the inputs that layers are fitted to: by these, distillation is judged, so they take no part in it.
HELD_OUT_SHARE: Final = 0.25

Inputs = tuple[torch.Tensor, ...]
"""The arguments of one call of a model."""
Source = torch.Tensor | Iterable[Any]
"""A tensor of inputs, or batches of them."""


def count_inputs(model: nn.Module, example: object) -> int:
    """How many tensors `model` takes: those of the `example` if there is one, else its arguments without default."""
    if example is not None:
        return len(example) if isinstance(example, list | tuple) else 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(one.kind in kinds and one.default is one.empty for one in parameters))


def as_inputs(example: object, where: str) -> Inputs:
    """A tensor or several as the arguments of a call; raises InputError for something else."""
    found = tuple(example) if isinstance(example, list | tuple) else (example,)
    for one in found:
        if not isinstance(one, torch.Tensor) or one.dim() < 2:
            why = f"there is a {type(one).__name__}" if not isinstance(one, torch.Tensor) else "one has no batch"
            raise InputError("Inputs must be tensors with a batch dimension", where=where, why=why)
    return tuple(one.detach() for one in found if isinstance(one, torch.Tensor))


def results_of(result: object) -> list[torch.Tensor]:
    """The floating-point tensors among what a model gives."""
    leaves = tree_leaves(result)
    return [one for one in leaves if isinstance(one, torch.Tensor) and one.is_floating_point()]


def in_batches(source: Source | None, size: int, count: int = 1) -> list[Inputs]:
    """The first `size` calibration inputs of a model that takes `count` tensors, in batches of one size."""
    if source is None:
        return []
    found: list[Inputs] = []
    for batch in _batches(source, count):
        found.append(batch)
        if sum(len(one[0]) for one in found) >= size:
            break
    total = sum(len(one[0]) for one in found)
    if not total:
        raise InputError("There is no calibration data", where="calibration", why="it is empty")
    kept = min(total, size)
    kept = max(kept // BATCH * BATCH, min(kept, BATCH))
    columns = [torch.split(torch.cat(parts)[:kept], BATCH) for parts in zip(*found, strict=True)]
    return list(zip(*columns, strict=True))


def held_out(batches: Sequence[Inputs]) -> list[Inputs]:
    """The first of the calibration inputs: those that distillation does not see."""
    left = max(1, int(HELD_OUT_SHARE * sum(len(one[0]) for one in batches)))
    found: list[Inputs] = []
    for batch in batches:
        found.append(tuple(one[:left] for one in batch))
        left -= len(found[-1][0])
        if not left:
            break
    return found


def training_batches(source: Source, skipped: int, count: int, generator: torch.Generator) -> Iterator[Inputs]:
    """Batches of inputs without end, all of them time and again but for the first `skipped` ones.

    A tensor is shuffled; batches of an iterable are taken as they come, so that a DataLoader may shuffle and augment.
    """
    while True:
        each = _shuffled(source, skipped, generator) if isinstance(source, torch.Tensor) else None
        empty = True
        for batch in each or _rest(source, skipped, count):
            empty = False
            yield batch
        if empty:
            why = f"all of it is among the {skipped} inputs that distillation is judged by"
            raise InputError("There is too little calibration data to distil with", where="calibration", why=why)


def _shuffled(source: torch.Tensor, skipped: int, generator: torch.Generator) -> Iterator[Inputs]:
    order = skipped + torch.randperm(max(0, len(source) - skipped), generator=generator)
    for rows in torch.split(order, BATCH):
        if len(rows):
            yield (source[rows],)


def _rest(source: Iterable[Any], skipped: int, count: int) -> Iterator[Inputs]:
    for batch in _batches(source, count):
        kept = tuple(one[skipped:] for one in batch)
        skipped = max(0, skipped - len(batch[0]))
        if len(kept[0]):
            yield kept


def _batches(source: Source, count: int) -> Iterator[Inputs]:
    for batch in [source] if isinstance(source, torch.Tensor) else source:
        several = tuple(batch) if isinstance(batch, list | tuple) and batch else (batch,)
        if len(several) < count:
            why = f"a batch has {len(several)} tensors, and the model takes {count}"
            raise InputError("Calibration data does not fit the model", where="calibration", why=why)
        found = as_inputs(several[:count], "calibration")
        if len({len(one) for one in found}) > 1:
            why = f"there are shapes {', '.join(str(tuple(one.shape)) for one in found)}"
            raise InputError("Tensors of one batch are of different lengths", where="calibration", why=why)
        yield found
