"""The frame of every GPU kernel: a device function over pointers, run by `grid` blocks of `threads` threads.

It is generated as a raw function whose last two parameters are numbers, ``(pointers…, int32 block, int32 thread)``, and
becomes a device function by binding these to the hardware's indices. So do TVM's own kernels, whose last two
parameters are the number of a thread and how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.kernel import Frame, Parameter, coordinates, when
from sepc.backends.stages.vector import Expr, Index
from sepc.ir.arithmetic import ceil_div

LAUNCH = "sepc.launch"
"""Attribute of a device function: how many blocks, threads of each, and bytes of shared memory to ask for."""

TASK_THREADS = 128
"""Threads of a block where each thread has a task of its own: four warps, so that a multiprocessor can be full."""

_DEVICE_KERNEL = 2  # tvm::CallingConv::kDeviceKernelLaunch
_THREAD_INDEX = 1  # IterVar.ThreadIndex


@dataclass(frozen=True)
class GpuFrame(Frame):
    """A frame in which the stages of CPUs work: each task is that of one thread.

    Neighbouring threads have neighbouring tasks. `totals` collects how many tasks there are.
    """

    totals: list[int] = field(default_factory=list)

    @contextmanager
    def tasks(self, counts: Sequence[int]) -> Iterator[tuple[Index, ...]]:
        """This thread's task of an index space, if it has one."""
        total = math.prod(counts)
        self.totals.append(total)
        with when(self.thread < total):
            yield coordinates(self.thread, counts)


@dataclass(frozen=True)
class BlockFrame:
    """What the body of a kernel works with whose blocks compute together: buffers, the block's and the thread's number.

    Attributes:
        buffers: by parameter name. block: its number. thread: that within the block. threads: of a block.
    """

    buffers: dict[str, Expr]
    block: Expr
    thread: Expr
    threads: int


def task_function(parameters: Sequence[Parameter], body: Callable[[Frame], None]) -> Expr:
    """The device function whose statements `body` emits for one thread, with as many threads as it has tasks."""

    def emit(frame: BlockFrame, totals: list[int], blocks: int = 1) -> None:
        thread = T.Bind(frame.block * TASK_THREADS + frame.thread)
        threads = tirx.const(blocks * TASK_THREADS, "int32")
        body(GpuFrame(frame.buffers, thread, threads, totals))

    blocks = ceil_div(counted_tasks(parameters, emit, TASK_THREADS), TASK_THREADS)
    return block_function(parameters, lambda frame: emit(frame, [], blocks), blocks, TASK_THREADS)


def counted_tasks(parameters: Sequence[Parameter], emit: Callable[[BlockFrame, list[int]], None], threads: int) -> int:
    """How many tasks there are of a kernel whose body `emit` emits, which appends it to the list; at least 1.

    The body is emitted for that, and forgotten.
    """
    totals: list[int] = []
    _raw_function(parameters, lambda frame: emit(frame, totals), threads)
    return max(1, *totals, 1)


def block_function(
    parameters: Sequence[Parameter],
    body: Callable[[BlockFrame], None],
    blocks: int,
    threads: int,
    shared_bytes: int = 0,
) -> Expr:
    """The device function whose statements `body` emits, for `blocks` blocks of `threads` threads.

    `shared_bytes`: shared memory that `body` allocates as "shared.dyn".
    """
    raw = _raw_function(parameters, body, threads)
    return _launched(raw, (blocks, threads, shared_bytes), lambda block, thread: (block, thread))


def barrier() -> None:
    """Wait until all threads of the block are here, and their writes to shared memory are seen."""
    T.evaluate(T.tvm_storage_sync("shared"))


def shared_function(raw: Expr, tasks: int) -> Expr:
    """A raw kernel of TVM's, ``(pointers…, int32 thread, int32 threads)``, with a thread for each of its `tasks`."""
    blocks = ceil_div(tasks, TASK_THREADS)
    threads = tirx.const(blocks * TASK_THREADS, "int32")
    return _launched(raw, (blocks, TASK_THREADS, 0), lambda block, thread: (block * TASK_THREADS + thread, threads))


def _raw_function(parameters: Sequence[Parameter], body: Callable[[BlockFrame], None], threads: int) -> Expr:
    with IRBuilder() as builder, T.prim_func():
        T.func_name("kernel")
        pointers = [T.arg(p.name, T.handle(p.dtype)) for p in parameters]
        block, thread = T.arg("block", T.int32()), T.arg("thread", T.int32())
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
        buffers = {
            parameter.name: T.decl_buffer((max(1, parameter.elements),), parameter.dtype, data=pointer)
            for parameter, pointer in zip(parameters, pointers, strict=True)
        }
        body(BlockFrame(buffers, block, thread, threads))
    return builder.get()


def _launched(raw: Expr, launch: tuple[int, int, int], values: Callable[[Expr, Expr], tuple[Expr, Expr]]) -> Expr:
    """`raw` as a device function; `values` gives its last two parameters for the number of a block and of a thread."""
    blocks, threads, shared_bytes = launch
    *pointers, first, second = raw.params
    block, thread = tirx.Var("block_index", "int32"), tirx.Var("thread_index", "int32")
    bound = [tirx.Bind(name, value) for name, value in zip((first, second), values(block, thread), strict=True)]
    statements = list(raw.body.seq) if isinstance(raw.body, tirx.SeqStmt) else [raw.body]
    body = tirx.SeqStmt([*bound, *(one for one in statements if not isinstance(one, tirx.Return))])
    for variable, tag, extent in ((thread, "threadIdx.x", threads), (block, "blockIdx.x", blocks)):
        axis = tirx.IterVar(tvm.ir.Range(0, extent), variable, _THREAD_INDEX, tag)
        body = tirx.AttrStmt(axis, "thread_extent", tirx.const(extent, "int32"), body)
    function = tirx.PrimFunc(pointers, body)
    attributes = {
        "global_symbol": str(raw.attrs["global_symbol"]),
        "calling_conv": _DEVICE_KERNEL,
        "tirx.noalias": True,
        "tirx.is_global_func": True,
        "tirx.kernel_launch_params": [
            "blockIdx.x",
            "threadIdx.x",
            *(["tirx.use_dyn_shared_memory"] if shared_bytes else []),
        ],
        LAUNCH: list(launch),
    }
    for key, value in attributes.items():
        function = function.with_attr(key, value)
    return function
