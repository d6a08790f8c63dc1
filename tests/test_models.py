"""Whole models against eager, at batch 1 and 3 and at the size they are meant for."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import sepc
from benchmarks.models import TESTED, load

TOLERANCE = 1e-4


@lru_cache(maxsize=1)
def model_and_images(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model and three images; kept for both batches, since drawing its parameters runs it."""
    model, (images,) = load(name, batch=3)
    return model, images


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", TESTED)
def test_agrees_with_eager(name: str, batch: int) -> None:
    model, images = model_and_images(name)
    x = images[:batch].contiguous()
    with torch.inference_mode():
        references = pytree.tree_leaves(model(x))
    results = pytree.tree_leaves(sepc.compile(model)(x))
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        assert (result - reference).abs().max() <= TOLERANCE * reference.abs().max()
