"""Running a program: one shared library, one table of addresses per call, PyTorch for the regions without a kernel.

Between two kernels of a segment there is no Python and no allocation. A call takes an arena from a pool, so that
several threads may call at once.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch

from sepc.errors import ArtifactError, OutOfMemoryError
from sepc.runtime.program import ARENA, CONSTANTS, FIRST_INPUT, HostCall, KernelCall, Program, TensorReference

ALIGNMENT_BYTES = 64
HUGE_PAGE_BYTES = 2 << 20
_OMP_PAUSE_HARD = 2
_paused_at_forks: set[int | None] = set()  # addresses of omp_pause_resource_all


class AnyExecutable(Protocol):
    """A program that can be run, here or elsewhere; members as in `Executable`."""

    @property
    def program(self) -> Program:
        """What is run."""

    @property
    def constants(self) -> torch.Tensor:
        """Block 1."""

    @property
    def library(self) -> bytes:
        """The shared library, as a file has it."""

    def run(
        self, inputs: Sequence[torch.Tensor], threads: int, stamps: ctypes.Array[Any] | None = None
    ) -> list[torch.Tensor]:
        """The program's results for `inputs`."""

    def profile(self, inputs: Sequence[torch.Tensor], threads: int, repeats: int) -> dict[str, float]:
        """Median time of each region over `repeats` runs, in microseconds, by the region's name."""


@runtime_checkable
class KernelRunner(Protocol):
    """An executable whose kernels this host runs one by one, so that they can be compared with PyTorch."""

    def scratch_blocks(self) -> list[torch.Tensor]:
        """Memory blocks as a call has them, inputs included, with nothing in them but the constants."""

    def run_kernels(self, calls: Sequence[KernelCall], blocks: Sequence[torch.Tensor]) -> None:
        """Run these, one after the other, on `blocks`; raises DeviceError where there is nothing to run them on."""


@dataclass(frozen=True)
class _Workspace:
    """What a call has for itself: the arena, and the addresses of all blocks, of which inputs' and results' change."""

    arena: torch.Tensor
    addresses: ctypes.Array[ctypes.c_void_p]


@dataclass(frozen=True)
class Executable:
    """A program with its library loaded.

    A call that comes after others finds the caches full of their data, so that what matters here is how much of Python
    and PyTorch it runs through, about 10 µs for each function.

    Attributes:
        program: what is run. library: the shared library, as a file has it.
        constants: block 1, as `aligned_bytes` makes it.
    """

    program: Program
    library: bytes
    constants: torch.Tensor
    _functions: ctypes.CDLL
    _workspaces: list[_Workspace] = field(default_factory=list)

    @staticmethod
    def load(program: Program, library: bytes, constants: torch.Tensor) -> Executable:
        """`program` with its library loaded. Raises ArtifactError if this system cannot load it."""
        functions = _loaded(library)
        _let_fork(functions)
        functions.sepc_run.restype = None
        functions.sepc_run.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32]
        return Executable(program, library, constants, functions)

    def run(
        self, inputs: Sequence[torch.Tensor], threads: int, stamps: ctypes.Array[Any] | None = None
    ) -> list[torch.Tensor]:
        """The program's results for `inputs`, whose shapes, strides and dtypes must be those it was compiled for.

        `stamps`, if given, receives number_of_calls + 1 times in seconds; see `profile`.
        """
        try:
            workspace = self._workspaces.pop()
        except IndexError:
            workspace = self._new_workspace()
        storages = [_allocated(*layout) for layout in self._storages]
        addresses, block = workspace.addresses, FIRST_INPUT
        for tensor in (*inputs, *storages):
            addresses[block] = tensor.data_ptr()
            block += 1
        blocks = [workspace.arena, self.constants, *inputs, *storages]
        segment = 0
        for step in self.program.steps:
            if isinstance(step, HostCall):
                run_on_host(step, blocks, stamps)
            else:
                self._functions.sepc_run(segment, addresses, threads, stamps, step[0].number)
                segment += 1
        self._workspaces.append(workspace)
        return [blocks[one] if isinstance(one, int) else view(one, blocks) for one in self._results]

    def _new_workspace(self) -> _Workspace:
        arena = aligned_bytes(self.program.arena_bytes)
        count = FIRST_INPUT + len(self.program.inputs) + len(self.program.storages)
        addresses = (ctypes.c_void_p * count)()
        addresses[ARENA], addresses[CONSTANTS] = arena.data_ptr(), self.constants.data_ptr()
        return _Workspace(arena, addresses)

    @cached_property
    def _storages(self) -> list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]:
        """Shape, strides and type of each storage of results, those of a result that has it for itself."""
        whole = {one.block: one for one in self.program.results if self._is_whole(one)}
        first = FIRST_INPUT + len(self.program.inputs)
        flat = [((storage.elements,), (1,), storage.dtype) for storage in self.program.storages]
        return [
            (own.shape, own.strides, own.dtype) if (own := whole.get(first + index)) else layout
            for index, layout in enumerate(flat)
        ]

    @cached_property
    def _results(self) -> list[int | TensorReference]:
        """Each result, or the block that it is."""
        return [one.block if self._is_whole(one) else one for one in self.program.results]

    def _is_whole(self, result: TensorReference) -> bool:
        """Whether a storage of results is this one and nothing else."""
        index = result.block - FIRST_INPUT - len(self.program.inputs)
        if index < 0 or sum(one.block == result.block for one in self.program.results) > 1:
            return False
        # Fewer elements than what the strides span would not be safe, more would be read by nobody.
        span = 1 + sum((size - 1) * stride for size, stride in zip(result.shape, result.strides, strict=True))
        storage = self.program.storages[index]
        return result.offset == 0 and (span, result.dtype) == (storage.elements, storage.dtype)

    def profile(self, inputs: Sequence[torch.Tensor], threads: int, repeats: int) -> dict[str, float]:
        """Median time of each region over `repeats` runs, in microseconds, by the region's name."""
        return median_times(self, inputs, threads, repeats)

    def kernel(self, symbol: str) -> Any:
        """The C function of kernel `symbol`: pointers, thread, threads."""
        return getattr(self._functions, symbol)

    def scratch_blocks(self) -> list[torch.Tensor]:
        """See `KernelRunner`."""
        return scratch_blocks(self.program, self.constants)

    def run_kernels(self, calls: Sequence[KernelCall], blocks: Sequence[torch.Tensor]) -> None:
        """See `KernelRunner`."""
        for call in calls:
            pointers = [ctypes.c_void_p(blocks[p.block].data_ptr() + p.offset_bytes) for p in call.arguments]
            self.kernel(call.symbol)(*pointers, 0, 1)


def scratch_blocks(program: Program, constants: torch.Tensor) -> list[torch.Tensor]:
    """Memory blocks on this host as a call of `program` has them, with nothing in them but the constants."""
    own = [torch.empty(one.elements, dtype=one.dtype) for one in (*program.inputs, *program.storages)]
    return [aligned_bytes(program.arena_bytes), constants, *own]


def median_times(
    executable: AnyExecutable, inputs: Sequence[torch.Tensor], threads: int, repeats: int
) -> dict[str, float]:
    """Median time of each region over `repeats` runs, in microseconds, by the region's name."""
    program = executable.program
    samples: dict[str, list[float]] = {name: [] for name in program.calls}
    for _ in range(repeats):
        stamps = (ctypes.c_double * (program.number_of_calls + 1))()
        executable.run(inputs, threads, stamps)
        for name, (first, end) in program.calls.items():
            samples[name].append((stamps[end] - stamps[first]) * 1e6)
    return {name: sorted(times)[len(times) // 2] for name, times in samples.items()}


def _loaded(library: bytes) -> ctypes.CDLL:
    """The shared library, mapped from a file that nobody else can read or change, and that is gone afterwards."""
    place = os.environ.get("TMPDIR", "the system's directory for temporary files")
    try:
        with tempfile.NamedTemporaryFile(prefix="sepc-", suffix=".so") as file:
            file.write(library)
            file.flush()
            # The loader's errors have no number.
            return ctypes.CDLL(file.name)
    except OSError as error:
        fix = "install what it names (libgomp.so.1 is GCC's OpenMP), or set TMPDIR to a directory that is not noexec"
        if error.errno is not None:
            fix = "free some space there, or set TMPDIR to another directory"
        raise ArtifactError(
            "The library of a compiled model cannot be loaded", where=place, why=error.strerror or str(error), fix=fix
        ) from error


def _let_fork(functions: ctypes.CDLL) -> None:
    """Have a process that is forked later start with no threads of OpenMP, and so make its own.

    GCC's keeps a pool of threads per thread that called it, which a forked process inherits without the threads: the
    next parallel region there, of ours or of PyTorch's, would wait for them for ever. OpenMP has it since 5.0 (GCC 9).
    """
    pause = getattr(functions, "omp_pause_resource_all", None)
    address = ctypes.cast(pause, ctypes.c_void_p).value if pause is not None else None
    if pause is not None and address not in _paused_at_forks:
        _paused_at_forks.add(address)
        os.register_at_fork(before=lambda: pause(_OMP_PAUSE_HARD))


def _allocated(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for results; raises OutOfMemoryError."""
    try:
        return torch.empty_strided(shape, strides, dtype=dtype)
    except RuntimeError as error:
        raise _no_memory(math.prod(shape) * dtype.itemsize, str(error)) from error


def _no_memory(size_bytes: int, why: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"There are no {size_bytes} bytes of memory for a call of a compiled model",
        why=why,
        fix='raise the limit of this process, call with smaller batches, or compile with optimize="memory"',
    )


def aligned_bytes(size_bytes: int) -> torch.Tensor:
    """Bytes, all 0, that start at a multiple of 64, in pages of 2 MiB where the system has them.

    They outlive the call that asks for them, and must not become inference tensors, which are read-only to later calls.
    Raises OutOfMemoryError.
    """
    # Measured on Zen 5, MobileNetV2 at batch 16 without chains: 92 ms in pages of 4 KiB, 69 ms in these.
    spare = HUGE_PAGE_BYTES if size_bytes >= HUGE_PAGE_BYTES else ALIGNMENT_BYTES
    try:
        # Private: what is shared, as it is by default, is one memory for a process and those that are forked from it.
        memory = mmap.mmap(-1, size_bytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise _no_memory(size_bytes, str(error)) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(mode=False):
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
    skip = -tensor.data_ptr() % spare
    return tensor[skip : skip + size_bytes] if size_bytes else tensor[skip:]


def view(reference: TensorReference, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor that `reference` names."""
    block = blocks[reference.block]
    if block.dtype != reference.dtype:
        block = block[: block.numel() // reference.dtype.itemsize * reference.dtype.itemsize].view(reference.dtype)
    return block.as_strided(reference.shape, reference.strides, block.storage_offset() + reference.offset)


def run_on_host(call: HostCall, blocks: Sequence[torch.Tensor], stamps: ctypes.Array[Any] | None) -> None:
    """Call the graph of a region in PyTorch and copy its results to where they were planned."""
    if stamps is not None:
        stamps[call.number] = time.monotonic()
    # As it was compiled; the caller's autocast would change types.
    with torch.no_grad(), torch._C._DisableAutocast():
        found = call.graph(*(view(reference, blocks) for reference in call.inputs))
    results = (found,) if call.positions is None else [found[position] for position in call.positions]
    for reference, result in zip(call.results, results, strict=True):
        view(reference, blocks).copy_(result)
    if stamps is not None:
        stamps[call.number + 1] = time.monotonic()
