"""Kernels between guard pages: memory that touches a page, at one end, which nobody may read or write.

Each kernel of a compiled model runs on copies of what its pointers point at, one mapping for each pointer, of just the
size that the kernel declares. What it changes is copied back, so that the model's results come out at the end, and are
compared with those of an ordinary call. Who touches a guard page is killed. (Fetching ahead of the end of the weights
is no touch: processors drop a prefetch that they cannot translate.)
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from tvm import tirx

from sepc.runtime.executable import Executable, run_on_host, view
from sepc.runtime.program import ARENA, KernelCall

Side = Literal["start", "end"]
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NOT_A_NUMBER = 0xFF  # a byte; four of them are one, as is what nobody has written


@contextmanager
def guarded(size_bytes: int, side: Side) -> Iterator[int]:
    """The address of so many bytes whose start, or end, touches a page that nobody may touch."""
    page = mmap.PAGESIZE
    inside = -(-size_bytes // page) * page
    memory = mmap.mmap(-1, inside + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ends = (base, base + page + inside)
    try:
        for address in ends:
            if _LIBC.mprotect(address, page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        yield base + page if side == "start" else base + page + inside - size_bytes
    finally:
        for address in ends:
            _LIBC.mprotect(address, page, mmap.PROT_READ | mmap.PROT_WRITE)


def declared_bytes(function: Any) -> list[int]:
    """The size of the buffer behind each pointer of a kernel, in order: its first statements declare them."""
    sizes: dict[Any, int] = {}
    for statement in function.body:
        if isinstance(statement, tirx.DeclBuffer):
            buffer = statement.buffer
            item = torch.empty(0, dtype=getattr(torch, str(buffer.dtype))).element_size()
            sizes[statement.data] = math.prod(int(extent) for extent in buffer.shape) * item
    return [sizes[one] for one in function.params[:-2]]  # Behind the pointers are the thread, and out of how many.


def call_guarded(call: KernelCall, function: Any, executable: Executable, blocks: Sequence[Any], side: Side) -> None:
    """Run one kernel on guarded copies of its arguments."""
    sizes = declared_bytes(function)
    assert len(sizes) == len(call.arguments), f"{call.symbol}: {len(sizes)} buffers, {len(call.arguments)} pointers"
    places = [blocks[one.block].data_ptr() + one.offset_bytes for one in call.arguments]
    for one, size in zip(call.arguments, sizes, strict=True):
        room = blocks[one.block].numel() * blocks[one.block].element_size() - one.offset_bytes
        assert size <= room, f"{call.symbol} declares {size} bytes where there are {room}"
    with ExitStack() as stack:
        copies = [stack.enter_context(guarded(size, side)) for size in sizes]
        before = [ctypes.string_at(place, size) for place, size in zip(places, sizes, strict=True)]
        for copy, content in zip(copies, before, strict=True):
            ctypes.memmove(copy, content, len(content))
        executable.kernel(call.symbol)(*map(ctypes.c_void_p, copies), 0, 1)
        for copy, place, content in zip(copies, places, before, strict=True):
            if ctypes.string_at(copy, len(content)) != content:
                ctypes.memmove(place, copy, len(content))


def run_guarded(
    executable: Executable, functions: Mapping[str, Any], inputs: Sequence[torch.Tensor], side: Side
) -> tuple[list[torch.Tensor], int]:
    """The results of a program whose kernels run between guard pages, and how many kernels that were."""
    program, kernels = executable.program, 0
    blocks = executable.scratch_blocks()
    blocks[ARENA].fill_(_NOT_A_NUMBER)
    blocks[2 : 2 + len(inputs)] = inputs
    for step in program.steps:
        if isinstance(step, list):
            for call in step:
                print(f"kernel {call.symbol} {side}", flush=True)  # The last words, if it touches a guard page.
                call_guarded(call, functions[call.symbol], executable, blocks, side)
                kernels += 1
        else:
            run_on_host(step, blocks, None)
    return [view(reference, blocks).clone() for reference in program.results], kernels


def differing_sides(compiled: Any, inputs: Sequence[torch.Tensor]) -> tuple[list[Side], int]:
    """The sides at which the latest specialisation of `compiled` gives other bits than without guards, and how many
    kernels ran.
    """
    latest = compiled._last()
    own = [inputs[index] for index in latest.description.order]
    expected = latest.executable.run(own, 1)
    sides: list[Side] = []
    count = 0
    for side in ("start", "end"):
        found, kernels = run_guarded(latest.executable, latest.lowered.functions, own, side)
        count += kernels
        same = all(
            torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(found, expected, strict=True)
        )
        if not same:
            sides.append(side)
    return sides, count
