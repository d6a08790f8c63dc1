"""Teams: threads of a block that do one task of a stage together, each a part of what it reduces.

A stage goes through what it reduces by its `Share`. A team's hands out the items in turn, and combines what the members
came to by halves, in shared memory: after log2(members) steps, with barriers between, the first place has it. (Threads
of a warp could exchange registers instead, which OpenCL lacks on most devices.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sepc.backends.gpu.kernel import BlockFrame, barrier, block_function, counted_tasks
from sepc.backends.regions import Build
from sepc.backends.stages.kernel import Frame, Parameter, Share, coordinates, loop, when
from sepc.backends.stages.vector import Expr, Index, cast, lanes_of, ramp, type_of
from sepc.cost_model.tiling import TeamTiling
from sepc.errors import VerificationError
from sepc.ir.arithmetic import ceil_div, split_lanes
from sepc.ir.element import FLOAT32


@dataclass(frozen=True)
class TeamShare(Share):
    """A thread's part of its team's task.

    Attributes:
        tiling: how many threads do a task. team: this thread's, within the block. member: its number in that.
        scratch: shared memory, for `tiling.width` numbers of each thread of the block.
    """

    tiling: TeamTiling
    team: Index
    member: Index
    scratch: Expr

    def for_each_vector(
        self, extent: int, lanes: int, body: Callable[[Index, int, int], None], unrolled: int = 1
    ) -> None:
        """Full vectors in turn; the narrower ones at the end, if there are any, are the first member's."""
        full = extent // lanes
        with self._items(full) as vector:
            body(vector * lanes, lanes, 0)
        first = full * lanes
        for width in split_lanes(extent - first, lanes):
            with self.once():
                body(first, width, 0)
            first += width

    @contextmanager
    def positions(self, counts: Sequence[Index]) -> Iterator[tuple[Index, ...]]:
        """See `Share`; the counts must be known."""
        known = [count for count in counts if isinstance(count, int)]
        if len(known) < len(counts):
            raise VerificationError("A team does not go through a window whose size depends on where it is")
        with self._items(prod(known)) as position:
            yield coordinates(position, known)

    def combined(self, value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """See `Share`; all threads of the block must come here."""
        lanes, members = lanes_of(value), self.tiling.members
        own = T.Bind(self._place(self.member))

        def at(place: Index) -> Expr:
            return ramp(place * lanes, lanes)

        T.buffer_store(self.scratch, cast(value, FLOAT32.name), [at(own)])
        barrier()
        distance = members // 2
        while distance:
            with when(self.member < distance):
                other = self._place(self.member + distance)
                both = combine(T.Bind(self.scratch[at(own)]), T.Bind(self.scratch[at(other)]))
                T.buffer_store(self.scratch, both, [at(own)])
            barrier()
            distance //= 2
        result = T.Bind(cast(self.scratch[at(self._place(0))], type_of(value)))
        barrier()  # Before anybody puts something else there.
        return result

    @contextmanager
    def once(self) -> Iterator[None]:
        """By the first member."""
        with when(tirx.EQ(self.member, tirx.const(0, "int32"))):
            yield

    @contextmanager
    def _items(self, count: int) -> Iterator[Index]:
        """This member's of so many items."""
        members = self.tiling.members
        turns = ceil_div(count, members)
        with loop(turns) as turn:
            item = self.member if turns == 1 else T.Bind(turn * members + self.member)
            with when(True if count == turns * members else item < count):
                yield item

    def _place(self, member: Index) -> Index:
        """The number of a member of this team within the block."""
        if self.tiling.row_wise:
            return self.team * self.tiling.members + member
        return member * self.tiling.teams + self.team


@dataclass(frozen=True)
class TeamFrame(Frame):
    """A frame in which each task is that of a team; `totals` collects how many tasks there are."""

    block: Index
    own: TeamShare
    totals: list[int] = field(default_factory=list)

    @staticmethod
    def of(frame: BlockFrame, tiling: TeamTiling, totals: list[int]) -> TeamFrame:
        """That of a thread of a block; allocates its shared memory."""
        counts = (tiling.teams, tiling.members) if tiling.row_wise else (tiling.members, tiling.teams)
        numbers = coordinates(frame.thread, counts)
        team, member = numbers if tiling.row_wise else numbers[::-1]
        scratch = T.alloc_buffer((tiling.threads * tiling.width,), FLOAT32.name, scope="shared")
        share = TeamShare(tiling, team, member, scratch)
        return TeamFrame(frame.buffers, frame.thread, tirx.const(tiling.threads, "int32"), frame.block, share, totals)

    @property
    def share(self) -> Share:
        """See `Frame`."""
        return self.own

    @contextmanager
    def tasks(self, counts: Sequence[int]) -> Iterator[tuple[Index, ...]]:
        """The team's task."""
        self.totals.append(prod(counts))
        yield coordinates(T.Bind(self.block * self.own.tiling.teams + self.own.team), counts)


def team_function(tiling: TeamTiling) -> Build:
    """What makes the device function of a stage by such teams, whose blocks have no team without a task."""

    def build(parameters: Sequence[Parameter], body: Callable[[Frame], None]) -> Expr:
        def emit(frame: BlockFrame, totals: list[int]) -> None:
            body(TeamFrame.of(frame, tiling, totals))

        total = counted_tasks(parameters, emit, tiling.threads)
        if total % tiling.teams:
            raise VerificationError("A team has no task", why=f"{total} tasks are not {tiling.teams} for each block")
        blocks = total // tiling.teams
        return block_function(parameters, lambda frame: emit(frame, []), blocks, tiling.threads)

    return build
