"""Tilings other than those that the cost model chooses: every legal one has to give the right result."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, TypeVar

import pytest

from sepc.cost_model import interleaved, planner, search
from sepc.cost_model.chain import choose_chain, stage_blocks
from sepc.cost_model.search import Choice
from sepc.cost_model.tiling import ChainTiling, DenseTiling, Tensor, Tiling
from sepc.ir.stage import Chain
from sepc.passes import fuse

FETCHED: Final[tuple[tuple[Tensor, ...], ...]] = ((), ("input",), ("operands", "results"), ("input", "results"))

TilingT = TypeVar("TilingT", bound=Tiling)


@contextmanager
def any_tiling(seed: int) -> Iterator[None]:
    """Tilings of stages are drawn at random from all that are legal."""
    generator = random.Random(seed)

    def draw(candidates: list[Tiling]) -> Tiling:
        return _fetching(generator.choice(candidates), generator)

    with tilings(draw):
        yield


def _fetching(tiling: TilingT, generator: random.Random) -> TilingT:
    """`tiling` with any tensors fetched, if it can fetch some."""
    return replace(tiling, fetched=generator.choice(FETCHED)) if isinstance(tiling, DenseTiling) else tiling


@contextmanager
def tilings(draw: Callable[[list[Tiling]], Tiling]) -> Iterator[None]:
    """Tilings of stages are those that `draw` gives of all that are legal, where they are of a kind that is legal."""

    def choose(
        stage: search.Stage, machine: search.Machine, threads: int, *, mixing: search.Mixing = "pixels", **costs: int
    ) -> Choice:
        candidates = search.candidates(stage, machine, threads, mixing=mixing)
        tiling = draw(candidates)
        if type(tiling) not in map(type, candidates):
            tiling = candidates[0]
        return Choice(tiling, search.predict(stage, tiling, machine, threads, **costs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose", choose)
        patch.setattr(interleaved, "choose", choose)
        patch.setattr(planner, "choose_interleaved", interleaved.choose_interleaved.__wrapped__)
        patch.setattr(search, "LEAST_HALF_PIXELS", 1)
        yield


@contextmanager
def any_chain(seed: int) -> Iterator[None]:
    """Whatever can be a chain is one, and its blocks, tasks and window are drawn at random from all that are legal."""
    generator = random.Random(seed)

    def choose(chain: Chain, machine: search.Machine, threads: int, **costs: Any) -> Choice:
        chosen = choose_chain(chain, machine, threads, **costs)
        blocks = tuple(_fetching(generator.choice(stage_blocks(link, machine)), generator) for link in chain.links)
        rows = generator.randint(1, chain.links[-1].out_height)
        return Choice(ChainTiling(blocks, rows, generator.randint(1, rows)), chosen.cost)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose_chain", choose)
        patch.setattr(fuse, "piece_time_us", lambda links, planner, objective: 1.0)
        yield
