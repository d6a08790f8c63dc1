"""A network compiled by sepc, for its latency: checked before it is timed."""

from __future__ import annotations

import torch
from torch import nn

import sepc
from sepc.bench.measure import TOLERANCE, relative_error
from sepc.separation.latency import Compiled


def compiled(model: nn.Module, x: torch.Tensor, threads: int) -> Compiled:
    """`model` compiled by sepc for inputs like `x`; raises if it is wrong."""
    found = sepc.compile(model, target="native", example_inputs=(x,), num_threads=threads)
    with torch.inference_mode():
        error = relative_error([found(x)], [model(x)])
    if not error <= TOLERANCE:
        raise RuntimeError(f"a compiled network is off by {error:.1e}")
    return found
