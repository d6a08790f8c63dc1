"""From a TVM tensor program to raw C-ABI kernels: inline, split at barriers, schedule, lower, rewrap.

A tensor program has one loop nest per tensor. Cheap element-wise tensors are inlined into their readers; every
remaining nest becomes a kernel of its own, because the threads must meet at a barrier before the next nest reads what
this one wrote. The schedule is generic: reductions above the innermost spatial loop, explicit vectors there, outer
loops fused and divided among threads. Reductions along contiguous memory accumulate one vector of partial results
instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.script.builder import ir as T

PrimFunc = Any  # TVM's Python classes carry no types
Schedule = Any
Block = Any
Loop = Any

_SPATIAL = 0  # IterVar.DataPar
_PARALLEL = 1  # ForKind.PARALLEL


@dataclass(frozen=True)
class Nest:
    """One loop nest of a tensor program as a function of its own, not yet scheduled.

    Attributes:
        function: an s_tir PrimFunc whose parameters are `reads`, then `writes`.
        reads, writes: the buffers (TVM variables) read and written, each once, in order of first use.
    """

    function: PrimFunc
    reads: tuple[Any, ...]
    writes: tuple[Any, ...]


def inline(function: PrimFunc, may_inline: Callable[[str], bool], heavy: Callable[[str], bool]) -> PrimFunc:
    """`function` with element-wise blocks inlined into their readers where `may_inline(name)` says so.

    A `heavy` block is inlined only into a single reader that evaluates it no more often than it has elements.
    """
    schedule = s_tir.Schedule(function)
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        name = str(schedule.get(block).name_hint)
        readers = schedule.get_consumers(block)
        if not readers or not may_inline(name) or any(kind != _SPATIAL for kind in _kinds(schedule, block)):
            continue
        if heavy(name) and (len(readers) > 1 or _iterations(schedule, readers[0]) > _iterations(schedule, block)):
            continue
        if len(schedule.get(block).writes) == 1 and not _is_parameter(function, schedule.get(block).writes[0].source):
            schedule.compute_inline(block)
    # An expression that was inlined twice defines its names twice, which TVM's checks refuse.
    return s_tir.transform.ConvertSSA()(schedule.mod)["main"]


def _is_parameter(function: PrimFunc, buffer: Any) -> bool:
    return any(str(parameter.name) == str(buffer.name) for parameter in function.params)


def split_nests(function: PrimFunc) -> list[Nest]:
    """The loop nests of `function`, in order; a buffer that one writes and a later one reads is a parameter of both."""
    schedule = s_tir.Schedule(function)
    body = function.body.block.body
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    return [_nest(schedule.get(block), statement) for block, statement in zip(blocks, statements, strict=True)]


def _nest(block: Any, statement: Any) -> Nest:
    writes = _unique(region.source for region in block.writes)
    reads = [buffer for buffer in _unique(region.source for region in block.reads) if buffer not in writes]
    root = s_tir.SBlockRealize([], tirx.const(True, "bool"), s_tir.SBlock([], [], [], "root", statement))
    function = tirx.PrimFunc([*reads, *writes], root)
    for key, value in (("global_symbol", "main"), ("tirx.noalias", True), ("s_tir", True)):
        function = function.with_attr(key, value)
    return Nest(function, tuple(reads), tuple(writes))


def _unique(buffers: Iterable[Any]) -> list[Any]:
    result: list[Any] = []
    for buffer in buffers:
        if not any(buffer.same_as(other) for other in result):
            result.append(buffer)
    return result


# ---- schedule ------------------------------------------------------------------------------------------------------


def _kinds(schedule: Schedule, block: Block) -> list[int]:
    return [int(variable.iter_type) for variable in schedule.get(block).iter_vars]


def _extent(schedule: Schedule, loop: Loop) -> int:
    return int(schedule.get(loop).extent)


def _iterations(schedule: Schedule, block: Block) -> int:
    return prod(int(variable.dom.extent) for variable in schedule.get(block).iter_vars)


def _divisor(extent: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides `extent`."""
    width = largest
    while extent % width:
        width //= 2
    return width


def scheduled(function: PrimFunc, lanes: int) -> PrimFunc:
    """One nest with its generic schedule; its outermost loop is parallel unless there is nothing to divide."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    loops, kinds = schedule.get_loops(block), _kinds(schedule, block)
    if not loops:  # a single element
        return schedule.mod["main"]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _SPATIAL]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != _SPATIAL]
    if reduced and _reduces_contiguously(schedule, block):
        _schedule_row_reduction(schedule, block, spatial, reduced, lanes)
    elif reduced:
        _schedule_column_reduction(schedule, block, spatial, reduced, lanes)
    else:
        _schedule_elements(schedule, block, spatial, lanes)
    return schedule.mod["main"]


def _vectorize(schedule: Schedule, loop: Loop, lanes: int) -> tuple[Loop, Loop | None]:
    """`loop` split into vectors of up to `lanes` elements: (outer, vector); (`loop`, None) if its extent is odd."""
    width = _divisor(_extent(schedule, loop), lanes)
    if width < min(4, lanes):
        return loop, None
    outer, inner = schedule.split(loop, [None, width])
    schedule.vectorize(inner)
    return outer, inner


def _parallelise(schedule: Schedule, loops: Sequence[Loop]) -> None:
    schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def _schedule_elements(schedule: Schedule, block: Block, spatial: Sequence[Loop], lanes: int) -> None:
    if len(spatial) == 1 or _is_flat(schedule, block):
        flat = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        schedule.parallel(_vectorize(schedule, flat, lanes)[0])
    elif prod(_extent(schedule, loop) for loop in spatial[:-1]) > 1:
        _vectorize(schedule, spatial[-1], lanes)
        _parallelise(schedule, spatial[:-1])
    else:
        _parallelise(schedule, [*spatial[:-1], _vectorize(schedule, spatial[-1], lanes)[0]])


def _is_flat(schedule: Schedule, block: Block) -> bool:
    """Whether every operand is read exactly where the result is written, so that the loops may be one."""
    node = schedule.get(block)
    own = [variable.var for variable in node.iter_vars]
    return all(
        len(region.region) == len(own)
        and all(
            isinstance(r.extent, tirx.IntImm) and int(r.extent) == 1 and r.min.same_as(v)
            for r, v in zip(region.region, own, strict=True)
        )
        for region in [*node.reads, *node.writes]
    )


def _reduces_contiguously(schedule: Schedule, block: Block) -> bool:
    """Whether the innermost dimension of the largest operand is walked by a reduction."""
    node = schedule.get(block)
    reduced = [v.var for v in node.iter_vars if int(v.iter_type) != _SPATIAL and int(v.dom.extent) > 1]
    regions = [region for region in node.reads if len(region.region)]
    return any(region.region[-1].min.same_as(variable) for region in regions for variable in reduced)


def _schedule_row_reduction(
    schedule: Schedule, block: Block, spatial: Sequence[Loop], reduced: Sequence[Loop], lanes: int
) -> None:
    width = _divisor(_extent(schedule, reduced[-1]), lanes)
    outer = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0] if spatial else None
    single = len(schedule.get(block).writes) == 1
    if width < min(4, lanes) or not single or outer is None:
        _schedule_scalar_reduction(schedule, block, outer, reduced, single)
        return
    inner = schedule.split(reduced[-1], [None, width])[1]
    partial = schedule.rfactor(inner, len(schedule.get(block).writes[0].region))
    rows, *summands, lane = schedule.get_loops(partial)
    schedule.reverse_compute_at(block, rows)
    schedule.vectorize(lane)
    schedule.parallel(rows)
    schedule.decompose_reduction(partial, summands[0])
    schedule.decompose_reduction(block, schedule.get_loops(block)[1])


def _schedule_scalar_reduction(
    schedule: Schedule, block: Block, outer: Loop, reduced: Sequence[Loop], single: bool
) -> None:
    """Several rows at a time: their sums do not wait for one another."""
    if outer is None:
        return
    rows = _divisor(_extent(schedule, outer), 8)
    if rows > 1 and single:
        outer, inner = schedule.split(outer, [None, rows])
        schedule.reorder(outer, *reduced, inner)
        schedule.unroll(inner)
    schedule.parallel(outer)
    schedule.decompose_reduction(block, reduced[0])


def _schedule_column_reduction(
    schedule: Schedule, block: Block, spatial: Sequence[Loop], reduced: Sequence[Loop], lanes: int
) -> None:
    """Reductions outside, one vector of independent results inside."""
    if not spatial:
        return
    rest, vector = _vectorize(schedule, spatial[-1], lanes)
    if vector is not None:
        outer, inner = [*spatial[:-1], rest], [vector]
    elif len(spatial) == 1:
        outer, inner = list(spatial), []
    else:
        outer, inner = list(spatial[:-1]), [rest]
    schedule.reorder(*outer, *reduced, *inner)
    _parallelise(schedule, outer)
    schedule.decompose_reduction(block, reduced[0])


# ---- lowering ------------------------------------------------------------------------------------------------------


def _passes() -> Any:
    """The passes of TVM's pipeline for scheduled functions up to flat buffers; the "tirx" pipeline does the rest."""
    blocks, flat = s_tir.transform, tirx.transform
    return tvm.transform.Sequential(
        [
            blocks.CanonicalizeLoop(),
            blocks.LowerInitBlock(),
            blocks.PlanAndUpdateBufferAllocationLocation(),
            blocks.ConvertBlocksToOpaque(),
            blocks.CompactBufferAllocation(),
            blocks.LowerMatchBuffer(),
            blocks.StmtSimplify(),
            blocks.LowerOpaqueBlock(),
            flat.FlattenBuffer(),
            flat.NarrowDataType(32),
            blocks.LoopPartition(),
            flat.ConvertSSA(),
        ]
    )


def raw_kernel(function: PrimFunc, name: str) -> tuple[PrimFunc, int]:
    """The scheduled nest as ``int32 name(ptr…, int32 thread, int32 threads)``, and how many tasks threads share.

    Without a parallel loop, thread 0 does everything.
    """
    lowered = _passes()(tvm.IRModule({"main": function}))["main"]
    pointers = [tirx.Var(f"p{i}", T.handle(str(buffer.dtype)).ty) for i, buffer in enumerate(lowered.params)]
    thread, threads = tirx.Var("thread", "int32"), tirx.Var("threads", "int32")
    statements = list(lowered.body.seq) if isinstance(lowered.body, tirx.SeqStmt) else [lowered.body]
    result: list[Any] = [tirx.DeclBuffer(b, data=p) for b, p in zip(lowered.params, pointers, strict=True)]
    tasks = 1
    for statement in statements:
        if isinstance(statement, tirx.DeclBuffer):
            result.append(statement)  # a flat view of a parameter
        elif isinstance(statement, tirx.For) and int(statement.kind) == _PARALLEL:
            tasks = max(tasks, int(statement.extent))
            result += _shared_loop(statement, thread, threads)
        else:
            result.append(tirx.IfThenElse(thread == 0, statement, None))
    result.append(tirx.Return(tirx.const(0, "int32")))
    raw = tirx.PrimFunc([*pointers, thread, threads], tirx.SeqStmt(result), ret_type=tvm.ir.PrimType("int32"))
    for key, value in (("global_symbol", name), ("calling_conv", 1), ("tirx.noalias", True)):
        raw = raw.with_attr(key, value)
    return raw, tasks


def _shared_loop(loop: Any, thread: Any, threads: Any) -> list[Any]:
    """`loop` over the contiguous chunk of its iterations that belongs to `thread`."""
    dtype = str(loop.loop_var.ty.dtype)
    extent = tirx.const(int(loop.extent), dtype)
    step, low, high = (tirx.Var(name, dtype) for name in ("step", "low", "high"))
    one_based = tirx.Cast(dtype, threads) if dtype != "int32" else threads
    own = tirx.Cast(dtype, thread) if dtype != "int32" else thread
    return [
        tirx.Bind(step, tirx.floordiv(extent + one_based - 1, one_based)),
        tirx.Bind(low, tirx.min(own * step, extent)),
        tirx.Bind(high, tirx.min(low + step, extent)),
        tirx.For(loop.loop_var, low, high - low, tirx.ForKind.SERIAL, loop.body),
    ]
