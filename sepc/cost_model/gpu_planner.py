"""The planner of a GPU: what `sepc.cost_model.planner.Planner` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sepc.cost_model.chain import Objective
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.cost_model.gpu_search import choose_gpu, is_gpu_chain
from sepc.cost_model.gpu_tasks import choose_tasks
from sepc.cost_model.gpu_teams import choose_teams
from sepc.cost_model.search import Choice, require_work
from sepc.cost_model.work import Work
from sepc.ir.convolution import Convolution
from sepc.ir.group_normalization import GroupNormalization
from sepc.ir.phases import Interleaved
from sepc.ir.stage import Stage


@dataclass(frozen=True)
class GpuPlanner:
    """Plans for a GPU.

    Convolutions and chains of them get a `GpuTiling`; chains are depthwise and dense links in the orders that
    `sepc.cost_model.gpu_tiling` describes. What reduces rows or whole images gets teams of threads that share a task,
    all else tasks as small as can be. The algorithms of Strassen and Winograd, which take scratch, and means over rows,
    which take whole rows per thread, are not offered.
    """

    machine: GpuMachine

    @property
    def between_us(self) -> float:
        """Nothing: predicted times have the launch."""
        return 0.0

    def choose(self, work: Work, objective: Objective = "time") -> Choice:
        """By instructions, bytes per level, and how many blocks and waves there are."""
        stage = work.stage
        if isinstance(stage, Convolution):
            require_work(stage)
            if work.packed and (found := self._choose_links([work])) is not None:
                return found
        arguments = self.machine, work.epilogue_cost, work.operand_bytes
        alone = choose_tasks(stage, *arguments)
        if isinstance(stage, Interleaved | GroupNormalization):
            return alone
        together = choose_teams(stage, *arguments)
        return alone if together is None else min(alone, together, key=lambda one: one.cost.time_us)

    def choose_chain(self, links: Sequence[Work], objective: Objective = "time") -> Choice | None:
        """The same, of what lies in shared memory between links."""
        for link in links:
            require_work(link.link)
        return self._choose_links(links)

    def chain_scratch_bytes(self, links: Sequence[Work]) -> int:
        """None: what lies between links is in shared memory."""
        return 0

    def gathers_row_means(self, links: Sequence[Stage]) -> bool:
        """None does."""
        return False

    def awaited_bytes(self, work: Work, choice: Choice) -> int:
        """None: many blocks wait at a time, and others run meanwhile."""
        return 0

    def idle_bytes(self, work: Work, choice: Choice) -> int:
        """None."""
        return 0

    @property
    def most_ahead_bytes(self) -> int:
        """Nothing."""
        return 0

    def _choose_links(self, links: Sequence[Work]) -> Choice | None:
        convolutions = tuple(link.link for link in links if isinstance(link.link, Convolution))
        if len(convolutions) < len(links) or not all(link.packed for link in links) or not is_gpu_chain(convolutions):
            return None
        costs, operands = (tuple(getattr(link, name) for link in links) for name in ("epilogue_cost", "operand_bytes"))
        return choose_gpu(convolutions, self.machine, costs, operands)
