"""Who passes ask for tilings and predicted times: the planner of a machine. So no pass knows what kind that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sepc.cost_model.ahead import SHARE_OF_CACHE, awaited_bytes, idle_bytes
from sepc.cost_model.chain import Objective, choose_chain
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_planner import GpuPlanner
from sepc.cost_model.group_normalization import choose_group_normalization
from sepc.cost_model.interleaved import choose_interleaved
from sepc.cost_model.machine import Machine
from sepc.cost_model.search import Choice, choose
from sepc.cost_model.work import Work, chain_of_work
from sepc.ir.convolution import Convolution
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Interleaved
from sepc.ir.stage import Stage

AnyMachine = Machine | GpuMachine


class Planner(Protocol):
    """Chooses tilings for a machine, and predicts times."""

    @property
    def between_us(self) -> float:
        """Microseconds between two kernels, beyond the predicted times of both."""

    def choose(self, work: Work, objective: Objective = "time") -> Choice:
        """The tiling of least predicted time; with the objective "memory", among those that take no scratch.

        Raises ValueError for what has no work, such as a stage of a batch of 0.
        """

    def choose_chain(self, links: Sequence[Work], objective: Objective = "time") -> Choice | None:
        """The same for `links` as one kernel; None if there is none that computes them."""

    def chain_scratch_bytes(self, links: Sequence[Work]) -> int:
        """Bytes of memory, beside its tensors, that a kernel of `links` takes at least."""

    def gathers_row_means(self, links: Sequence[Stage]) -> bool:
        """Whether a kernel of `links` could gather the means over the rows of its result."""

    def awaited_bytes(self, work: Work, choice: Choice) -> int:
        """Bytes of weights that a kernel waits for, which had better be there before; 0 if it computes for longer."""

    def idle_bytes(self, work: Work, choice: Choice) -> int:
        """Bytes that a kernel could fetch for later ones while it computes."""

    @property
    def most_ahead_bytes(self) -> int:
        """How much may be fetched that is not in use yet."""


def planner_of(machine: AnyMachine, threads: int) -> Planner:
    """The planner of `machine`, of which `threads` threads are used if it is a CPU."""
    return GpuPlanner(machine) if isinstance(machine, GpuMachine) else CpuPlanner(machine, threads)


@dataclass(frozen=True)
class CpuPlanner:
    """Plans for `threads` cores of a CPU; see `Planner`."""

    machine: Machine
    threads: int

    @property
    def between_us(self) -> float:
        """The barrier."""
        return self.machine.barrier_us if self.threads > 1 else 0.0

    def choose(self, work: Work, objective: Objective = "time") -> Choice:
        """By the cycles of arithmetic, and the bytes into each cache."""
        machine, threads, cost, operand_bytes = self.machine, self.threads, work.epilogue_cost, work.operand_bytes
        match work.stage:
            case GroupNormalization():
                return choose_group_normalization(
                    work.stage, machine, threads, epilogue_cost=cost, operand_bytes=operand_bytes
                )
            case Interleaved():
                return choose_interleaved(work.stage, machine, threads, epilogue_cost=cost, operand_bytes=operand_bytes)
        mixing = "nothing" if objective == "memory" else work.mixing
        return choose(work.stage, machine, threads, epilogue_cost=cost, operand_bytes=operand_bytes, mixing=mixing)

    def choose_chain(self, links: Sequence[Work], objective: Objective = "time") -> Choice | None:
        """Over a moving window of rows."""
        return choose_chain(
            chain_of_work(links),
            self.machine,
            self.threads,
            epilogue_costs=tuple(link.epilogue_cost for link in links),
            operand_bytes=sum(link.operand_bytes for link in links),
            objective=objective,
        )

    def chain_scratch_bytes(self, links: Sequence[Work]) -> int:
        """The ring buffers of the smallest window, for each thread."""
        return self.threads * chain_of_work(links).ring_bytes(step=1)

    def gathers_row_means(self, links: Sequence[Stage]) -> bool:
        """If it computes each row in one task, from left to right, as windows of rows are."""
        if len(links) > 1:
            return True
        lanewise = isinstance(links[0], Convolution) and links[0].lanewise(self.machine.lanes(links[0].element))
        return lanewise and links[0].kernel != (1, 1)

    def awaited_bytes(self, work: Work, choice: Choice) -> int:
        """If they come from behind the second level."""
        return awaited_bytes(work, choice, self.machine)

    def idle_bytes(self, work: Work, choice: Choice) -> int:
        """As fast as DRAM is."""
        return idle_bytes(work, choice, self.machine, self.threads)

    @property
    def most_ahead_bytes(self) -> int:
        """A part of the last cache."""
        cache = self.machine.last_cache
        return int(SHARE_OF_CACHE * cache.size_per_core_bytes(self.threads) * min(self.threads, cache.shared_by_cores))
