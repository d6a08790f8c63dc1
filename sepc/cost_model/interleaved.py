"""The choice of a tiling for a transposed convolution: one for each of its phases, which run one after the other."""

from __future__ import annotations

from functools import lru_cache

from sepc.cost_model.latency import in_sequence
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import Choice, choose
from sepc.cost_model.tiling import DenseTiling, InterleavedTiling, LaneTiling
from sepc.ir.phases import Interleaved


@lru_cache(maxsize=4096)
def choose_interleaved(
    stage: Interleaved, machine: Machine, threads: int, *, epilogue_cost: int = 0, operand_bytes: int = 0
) -> Choice:
    """The tiling of least predicted time for `stage`; arguments and errors as of `sepc.cost_model.search.choose`.

    The input counts as read anew by each phase, and the kernel as started once.
    """
    choices = [
        choose(
            phase.convolution,
            machine,
            threads,
            epilogue_cost=epilogue_cost,
            operand_bytes=operand_bytes // len(stage.phases),
            mixing="nothing",
        )
        for phase in stage.phases
    ]
    tilings = tuple(one.tiling for one in choices if isinstance(one.tiling, DenseTiling | LaneTiling))
    return Choice(InterleavedTiling(tilings), in_sequence([one.cost for one in choices], -machine.kernel_overhead_us))
