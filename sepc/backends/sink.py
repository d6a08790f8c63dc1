"""What becomes of the vectors that a stage finishes: the elementwise operators of its region, and the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.elementwise import Expression
from sepc.backends.stages.fetching import Fetched
from sepc.backends.stages.row_means import RowMeans
from sepc.backends.stages.vector import Expr, Index, Operand, cast, lanes_of, transpose
from sepc.cost_model.tiling import Tensor
from sepc.ir import ops
from sepc.ir.convolution import Convolution
from sepc.ir.problem import Problem, Strides
from sepc.ir.stage import Pooling


def sink_of(
    problem: Problem, buffers: Mapping[str, Expr], names: Mapping[fx.Node, str], write: Operand, means: str = ""
) -> Sink:
    """What becomes of the results of the problem's stage, given the kernel's buffers by parameter name.

    `names`: the parameters of what the elementwise operators read; `means`: that for the row means.
    """
    sums = RowMeans(Operand(buffers[means], problem.row_means), extents_of(problem)[2]) if means else None
    return Sink(problem.anchor, expression_of(problem, buffers, names), write, sums)


def expression_of(problem: Problem, buffers: Mapping[str, Expr], names: Mapping[fx.Node, str]) -> Expression:
    """The elementwise operators that follow the problem's stage."""
    operands = {node: Operand(buffers[names[node]], strides) for node, strides in problem.operands.items()}
    return Expression(problem.epilogue, operands)


def is_transposed(strides: Strides) -> bool:
    """Whether neighbours along the last dimension but one are next to each other in memory, and no others."""
    return len(strides) > 1 and strides[-2] == 1 and strides[-1] > 1


@dataclass(frozen=True)
class Sink:
    """Evaluates the elementwise operators that follow a stage, and stores what comes out."""

    anchor: fx.Node | None
    expression: Expression
    write: Operand
    means: RowMeans | None = None

    def fetched(self, tensors: Sequence[Tensor]) -> list[Fetched]:
        """Those of `tensors` that this reads and writes."""
        operands = self.expression.operands.values() if "operands" in tensors else ()
        results = [Fetched(self.write, write=True)] if "results" in tensors else []
        return [*map(Fetched, operands), *results]

    def finish(self, position: Sequence[Index], value: Expr) -> None:
        """Take a finished vector of the anchor at `position`."""
        values = {self.anchor: cast(value, ops.element(self.anchor).name)} if self.anchor is not None else {}
        result = T.Bind(self.expression(values, position, lanes_of(value)))
        self.write.store(position, result)
        if self.means is not None:
            self.means.add(position, result)

    def compute_tile(self, position: Sequence[Index], lanes: int) -> None:
        """Compute `lanes` × `lanes` elements along the last two dimensions from `position` on, from operands alone."""
        *outer, row, column = position
        columns: dict[fx.Node, list[Expr]] = {}
        for node, operand in self.expression.operands.items():
            if is_transposed(operand.strides):
                places = [(*outer, row, column + index) for index in range(lanes)]
                columns[node] = transpose([T.Bind(operand.load(place, lanes, axis=-2)) for place in places])
        for index in range(lanes):
            place = (*outer, row + index, column)
            given = {node: vectors[index] for node, vectors in columns.items()}
            self.write.store(place, self.expression(given, place, lanes))

    def compute(self, position: Sequence[Index], lanes: int) -> None:
        """Compute `lanes` elements at `position` from operands alone."""
        self.write.store(position, self.expression({}, position, lanes))


def extents_of(problem: Problem) -> tuple[int, ...]:
    """Extents of the iteration space."""
    stage = problem.stage
    if isinstance(stage, Convolution | Pooling):
        return *stage.leading, stage.out_height, stage.out_width, stage.out_channels
    return stage.extents
