"""Tilings as data: how the loops of a stage are blocked. The cost model chooses one; the backends emit it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final, Literal

from sepc.cost_model.gpu_tiling import GpuTiling
from sepc.ir.arithmetic import ceil_div
from sepc.ir.convolution import WINOGRAD_TAPS, Convolution
from sepc.ir.element import FLOAT32

Narrow = Literal["alone", "in pairs", "widened"]
"""What registers hold of a panel's vectors that are narrower than its others: one vector, those of two columns side by
side, or one vector over and over, so that all multiply-adds are of full width."""
Tensor = Literal["input", "operands", "results"]
"""What a block reads and writes beside weights; operands are what the epilogue reads."""


@dataclass(frozen=True)
class RegisterBlock:
    """Results of a dense convolution that are held in registers: so many columns times the vectors of a panel.

    Attributes:
        columns: output columns. panel: vector widths. narrow: see `Narrow`. step_channels: see `DenseTiling`.
    """

    columns: int
    panel: tuple[int, ...]
    narrow: Narrow = "alone"
    step_channels: int = 1

    def column_groups(self, width: int) -> list[range]:
        """The columns that share a register each, for a vector of that width.

        Two where others of the panel's vectors are wider and `narrow` says so: a multiply-add of full width takes as
        long as a narrow one. (144→24 channels on 56², Zen 5: 123 µs in vectors of 16 and 8 channels, 95 with the latter
        in pairs.) Where all are narrow, loading the inputs takes as long as the multiply-adds (64→8: both 31 µs).
        """
        size = 2 if self.narrow == "in pairs" and width < max(self.panel) else 1
        return [range(first, min(first + size, self.columns)) for first in range(0, self.columns, size)]

    def copies(self, width: int) -> int:
        """How many times over a register holds a vector of that width, if only one column's.

        LLVM has Arm's cores multiply by an element of a register, unless vectors of two widths are multiplied by it:
        then it copies that element to all lanes of another register first. (10→10 channels on 56², Neoverse N1 by
        LLVM's model: 14 cycles for 21 multiply-adds, two per cycle; widened 11.)
        """
        return max(self.panel) // width if self.narrow == "widened" else 1

    @property
    def vectors(self) -> int:
        """Vectors of results."""
        return self.columns * len(self.panel)

    @property
    def accumulators(self) -> int:
        """Registers that hold them."""
        return sum(len(self.column_groups(width)) for width in self.panel)

    @property
    def registers(self) -> int:
        """All registers that the innermost loop needs: accumulators, a weight per vector of the panel, an input; or one
        for each column, where an input is kept for several steps.
        """
        return self.accumulators + len(self.panel) + (1 if self.step_channels == 1 else self.columns)


@dataclass(frozen=True)
class Ahead:
    """What a kernel fetches while it runs, for one that waits for its weights later.

    Attributes:
        fetched_bytes: how much. skipped_bytes: what lies between the end of its own weights and that.
    """

    fetched_bytes: int
    skipped_bytes: int

    def __str__(self) -> str:
        return f"{self.fetched_bytes / 1e6:.2g} MB fetched ahead"


@dataclass(frozen=True)
class DenseTiling:
    """Blocking of a convolution whose inner loop multiplies one input value with a vector of output channels.

    Attributes:
        columns: output columns held in registers.
        panel: vector widths of one panel of output channels, e.g. (16, 16); the rest of the channels forms a
            narrower panel.
        rows: output rows per task.
        blocks: column blocks of the row's interior per task.
        panels: panels per task.
        narrow: how registers hold the panel's narrower vectors.
        step_channels: input channels of a column that one load brings, a vector of them where it is more than one;
            multiply-adds are then by an element of that.
        ahead: what it fetches for later kernels.
        fetched: the tensors of which a block fetches lines: the next block's of the input, its own of the others.
    """

    columns: int
    panel: tuple[int, ...]
    rows: int
    blocks: int
    panels: int
    narrow: Narrow = "alone"
    step_channels: int = 1
    ahead: tuple[Ahead, ...] = ()
    fetched: tuple[Tensor, ...] = ()

    @property
    def block(self) -> RegisterBlock:
        """What is held in registers."""
        return RegisterBlock(self.columns, self.panel, self.narrow, self.step_channels)

    def __str__(self) -> str:
        panel = "+".join(map(str, self.panel))
        if self.narrow != "alone" and len(set(self.panel)) > 1:
            panel += f" {self.narrow}"
        if self.step_channels > 1:
            panel += f", {self.step_channels} inputs a load"
        task = f"{self.rows} rows × {self.blocks} blocks × {self.panels} panels"
        head = f"registers {self.columns}×({panel}), task {task}"
        fetched = (f"fetching {' and '.join(self.fetched)}",) if self.fetched else ()
        return ", ".join((head, *fetched, *map(str, self.ahead)))


@dataclass(frozen=True)
class ProductTiling(ABC):
    """Blocking of a convolution that is made of several matrix products of one shape.

    Attributes:
        product: how each of them is blocked.
        by_product: whether a task computes all its blocks of a product before the next one, else all products of a
            block.
    """

    product: DenseTiling
    by_product: bool

    @property
    @abstractmethod
    def count(self) -> int:
        """How many products there are."""

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """Its name."""

    @abstractmethod
    def product_of(self, convolution: Convolution) -> Convolution:
        """One of the products, a pointwise convolution over a single row.

        Raises ValueError where `convolution` cannot be had from such products.
        """

    def __str__(self) -> str:
        return f"{'product by product' if self.by_product else 'block by block'}, {self.product}"


@dataclass(frozen=True)
class StrassenTiling(ProductTiling):
    """Blocking of a matrix product that is made of seven products of its halves."""

    count = 7
    algorithm = "Strassen's algorithm"

    def product_of(self, convolution: Convolution) -> Convolution:
        """A product of halves."""
        return _existing(convolution.halves, convolution)

    def __str__(self) -> str:
        return f"seven products of halves, {super().__str__()}"


@dataclass(frozen=True)
class WinogradTiling(ProductTiling):
    """Blocking of a 3×3 convolution by Winograd's algorithm.

    Attributes:
        outputs: rows and columns of a tile of results.
    """

    outputs: int

    @property
    def size(self) -> int:
        """Rows and columns of the inputs of a tile."""
        return self.outputs + WINOGRAD_TAPS - 1

    @property
    def algorithm(self) -> str:
        """Its name, with the size of a tile of results."""
        return f"Winograd's algorithm of {self.outputs}×{self.outputs}"

    @property
    def count(self) -> int:
        """One product for each position of a tile."""
        return self.size**2

    def product_of(self, convolution: Convolution) -> Convolution:
        """The product for one position; its pixels are the tiles."""
        return _existing(convolution.winograd_product(self.outputs), convolution)

    def __str__(self) -> str:
        return f"tiles of {self.outputs}×{self.outputs} results, {super().__str__()}"


def _existing(product: Convolution | None, convolution: Convolution) -> Convolution:
    if product is None:
        raise ValueError(f"{convolution} is no sum of such products")
    return product


MOST_UNROLLED_TAPS: Final = 11
"""Taps of a kernel row whose weights and inputs LLVM still handles well in straight code.

Measured on Zen 5: 7, 9 and 11 taps are as quick that way as in parts; 31 take 309 µs (256 channels, 2048 columns) where
parts of 8 take 151, and 27×27 take 1048 where parts of 9 take 540: it keeps all of them alive, on the stack.
"""


def unrolled_taps(taps: int) -> int:
    """How many of the `taps` of a kernel row a lanewise block handles at a time: even parts, the last one shorter."""
    return ceil_div(taps, ceil_div(taps, MOST_UNROLLED_TAPS))


@dataclass(frozen=True)
class LaneTiling:
    """Blocking of a stage in which every vector lane is a channel of its own: depthwise, pooling.

    Attributes:
        columns: output columns held in registers.
        vectors: vectors of channels held in registers.
        rows: output rows per task.
        groups: groups of `vectors` vectors of channels, `turns` times over, per task.
        blocks: column blocks of the row's interior per task; None: whole rows.
        turns: how many times a block of registers is computed over the same columns, each time for other channels: so
            that narrow vectors, too, make use of whole cache lines.
    """

    columns: int
    vectors: int
    rows: int
    groups: int
    blocks: int | None = None
    turns: int = 1

    @property
    def group_vectors(self) -> int:
        """Vectors of channels in a group."""
        return self.vectors * self.turns

    def __str__(self) -> str:
        blocks = "" if self.blocks is None else f" × {self.blocks} blocks"
        task = f"{self.rows} rows{blocks} × {self.groups} channel groups"
        turns = "" if self.turns == 1 else f" in {self.turns} turns"
        return f"registers {self.columns}×{self.vectors} vectors{turns}, task {task}"


@dataclass(frozen=True)
class RowTiling:
    """Blocking of a stage without reuse (elementwise, normalisation): `rows` of its outer iteration space per task."""

    rows: int

    def __str__(self) -> str:
        return f"task {self.rows} rows"


@dataclass(frozen=True)
class TeamTiling:
    """Blocking of a stage that reduces, for a GPU: the threads of a team go through what a task reduces together.

    Member m of a team takes items m, m + members, … of its task, which are vectors of a row, or pixels of an image.
    What the members came to is combined in shared memory.

    Attributes:
        task: what one task is; a team has one.
        members: threads of a team, a power of two. teams: of a thread block.
        row_wise: whether threads next to each other are members of one team, as items next to each other are in memory;
            else they are of teams next to each other, since it is tasks that are.
        width: numbers that each member combines at a time.
    """

    task: LaneTiling | RowTiling
    members: int
    teams: int
    row_wise: bool
    width: int

    def __str__(self) -> str:
        each = "row" if self.row_wise else "vector of channels"
        return f"{self.members} threads for each {each}, {self.teams} of these in a block"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.members * self.teams

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: what each thread combines, in float32."""
        return FLOAT32.size_bytes * self.threads * self.width


LinkTiling = DenseTiling | LaneTiling | RowTiling  # of stages that can be computed a few rows at a time
StageTiling = LinkTiling | StrassenTiling | WinogradTiling


@dataclass(frozen=True)
class ChainTiling:
    """Blocking of a chain of stages over a moving window of rows.

    Attributes:
        links: the register blocks of the links; how their tasks are cut does not apply.
        rows: output rows of the last link per task; each task computes its halo anew.
        step: output rows of the last link per turn of the window.
    """

    links: tuple[LinkTiling, ...]
    rows: int
    step: int

    def __str__(self) -> str:
        blocks = ", ".join(
            "rows" if isinstance(link, RowTiling) else str(link).split(", task")[0].removeprefix("registers ")
            for link in self.links
        )
        return f"registers {blocks}; window of {self.step} rows, task {self.rows} rows"


@dataclass(frozen=True)
class InterleavedTiling:
    """Blocking of a transposed convolution: of each of its phases."""

    phases: tuple[DenseTiling | LaneTiling, ...]

    def __str__(self) -> str:
        return f"{len(self.phases)} phases: " + "; ".join(dict.fromkeys(map(str, self.phases)))


Tiling = StageTiling | ChainTiling | InterleavedTiling | TeamTiling | GpuTiling
