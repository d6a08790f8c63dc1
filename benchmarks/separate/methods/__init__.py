"""Methods of the literature, written from their papers' descriptions, for comparison; no part of sepc."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from benchmarks.separate.methods.decoupling import Decoupling
from benchmarks.separate.methods.low_rank import LowRank
from benchmarks.separate.methods.method import Method
from benchmarks.separate.methods.pruning import Pruning

METHODS: Final[Mapping[str, Method]] = {
    one.name: one for one in (Decoupling(), LowRank("low-rank", (1,)), LowRank("alds", (1, 2, 4)), Pruning())
}
"""The methods by name."""
