"""Running a program by OpenCL, on any device that has it: a CPU by PoCL, to verify kernels, or a GPU.

The blocks of memory are buffers of the device for the time of a call. What PyTorch runs between the kernels, it runs on
the host, where the blocks are copied before and from where they are copied after.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from ctypes import Array
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sepc.errors import ArtifactError, BuildError, DeviceError
from sepc.runtime.executable import aligned_bytes, median_times, run_on_host, scratch_blocks, view
from sepc.runtime.gpu import Launch
from sepc.runtime.program import CONSTANTS, HostCall, KernelCall, Program

Handle = Any  # PyOpenCL has no types.


@dataclass(frozen=True)
class OpenClExecutable:
    """A program for OpenCL.

    Attributes:
        program: what is run. constants: block 1.
        source: all kernels as OpenCL C. launches: how each is launched, by symbol.
    """

    program: Program
    constants: torch.Tensor
    source: str
    launches: Mapping[str, Launch]
    _ready: list[_Kernels] = field(default_factory=list)

    @property
    def library(self) -> bytes:
        """Not to be had: raises ArtifactError."""
        raise ArtifactError(
            "A model for OpenCL cannot be saved",
            why="its kernels are built for the device that runs them, by the driver of that",
            fix="compile it where it is to run",
        )

    def run(self, inputs: Sequence[torch.Tensor], threads: int, stamps: Array[Any] | None = None) -> list[torch.Tensor]:
        """The program's results for `inputs`, tensors of the CPU; as `Executable.run`, whatever `threads` is.

        Raises DeviceError where there is no device, BuildError where its driver refuses the kernels.
        """
        kernels = self._kernels
        storages = [torch.empty(storage.elements, dtype=storage.dtype) for storage in self.program.storages]
        blocks = [aligned_bytes(self.program.arena_bytes), self.constants, *map(_flat, inputs), *storages]
        buffers = [kernels.constants if index == CONSTANTS else upload(block) for index, block in enumerate(blocks)]
        if stamps is not None:
            stamps[0] = time.monotonic()
        for step in self.program.steps:
            if isinstance(step, HostCall):
                _run_on_host(step, blocks, buffers)
                if stamps is not None:
                    stamps[step.number + 1] = time.monotonic()
                continue
            for call in step:
                kernels.launch(call, self.launches[call.symbol], buffers)
                if stamps is not None:
                    device().queue.finish()
                    stamps[call.number + 1] = time.monotonic()
        for index in {reference.block for reference in self.program.results} - {CONSTANTS}:
            download(buffers[index], blocks[index])
        return [view(reference, blocks) for reference in self.program.results]

    def profile(self, inputs: Sequence[torch.Tensor], threads: int, repeats: int) -> dict[str, float]:
        """Median time of each region over `repeats` runs, in microseconds, by the region's name."""
        return median_times(self, inputs, threads, repeats)

    def scratch_blocks(self) -> list[torch.Tensor]:
        """See `sepc.runtime.executable.KernelRunner`."""
        return scratch_blocks(self.program, self.constants)

    def run_kernels(self, calls: Sequence[KernelCall], blocks: Sequence[torch.Tensor]) -> None:
        """See `sepc.runtime.executable.KernelRunner`."""
        kernels = self._kernels
        used = {pointer.block for call in calls for pointer in call.arguments} - {CONSTANTS}
        buffers = {CONSTANTS: kernels.constants, **{index: upload(blocks[index]) for index in used}}
        for call in calls:
            kernels.launch(call, self.launches[call.symbol], buffers)
        for index in used:
            download(buffers[index], blocks[index])

    @property
    def _kernels(self) -> _Kernels:
        """The kernels, built at the first call; several threads may each build them then."""
        if not self._ready:
            self._ready.append(_Kernels.build(self.source, self.launches, self.constants))
        return self._ready[0]


@dataclass(frozen=True)
class _Kernels:
    """Kernels that a device has built, and the constants there."""

    by_symbol: Mapping[str, Handle]
    constants: Handle

    @staticmethod
    def build(source: str, launches: Mapping[str, Launch], constants: torch.Tensor) -> _Kernels:
        cl = device().module
        try:
            program = cl.Program(device().context, source).build() if launches else None
        except cl.RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if "error" in line), str(error).splitlines()[0])
            raise BuildError(
                "OpenCL's driver refuses the kernels", where=device().name, why=reason, fix="report it, with the driver"
            ) from error
        return _Kernels({symbol: cl.Kernel(program, symbol) for symbol in launches}, upload(constants))

    def launch(self, call: KernelCall, launch: Launch, buffers: Sequence[Handle] | Mapping[int, Handle]) -> None:
        """Run a kernel after what was run before, on `buffers`, by the number of their block."""
        arguments: list[Any] = []
        for pointer, size_bytes in zip(call.arguments, launch.element_bytes, strict=True):
            arguments += [buffers[pointer.block], np.int32(pointer.offset_bytes // size_bytes)]
        kernel = self.by_symbol[call.symbol]
        # One queue, in order: each waits for those before it.
        kernel(device().queue, (launch.blocks * launch.threads,), (launch.threads,), *arguments)


@dataclass(frozen=True)
class Device:
    """The OpenCL device that programs run on."""

    module: Handle
    context: Handle
    queue: Handle

    @cached_property
    def name(self) -> str:
        """What its driver calls it."""
        return str(self.context.devices[0].name)


@cache
def device() -> Device:
    """The first GPU that has OpenCL, else the first device that has; raises DeviceError where there is none."""
    why = "no device has a driver for it"
    try:
        import pyopencl as cl

        found = [one for platform in cl.get_platforms() for one in platform.get_devices()]
        found.sort(key=lambda one: not one.type & cl.device_type.GPU)
        if found:
            context = cl.Context(found[:1])
            return Device(cl, context, cl.CommandQueue(context))
    except ImportError as error:
        why = str(error)
    except cl.Error as error:
        why = str(error)
    raise DeviceError(
        "There is no OpenCL device",
        where="target='opencl'",
        why=why,
        fix="pip install pyopencl, and install a driver: that of your GPU, or PoCL for this CPU "
        "(Debian: apt install pocl-opencl-icd)",
    )


def upload(block: torch.Tensor) -> Handle:
    """A buffer of the device with what is in `block`; OpenCL has none without a byte."""
    cl = device().module
    flags = cl.mem_flags.READ_WRITE
    if not block.numel():
        return cl.Buffer(device().context, flags, 1)
    return cl.Buffer(device().context, flags | cl.mem_flags.COPY_HOST_PTR, hostbuf=_bytes(block))


def download(buffer: Handle, block: torch.Tensor) -> None:
    """Copy a buffer of the device to `block`, after all kernels before."""
    if block.numel():
        device().module.enqueue_copy(device().queue, _bytes(block), buffer)


def _run_on_host(call: HostCall, blocks: Sequence[torch.Tensor], buffers: Sequence[Handle]) -> None:
    for index in {reference.block for reference in (*call.inputs, *call.results)} - {CONSTANTS}:
        download(buffers[index], blocks[index])
    run_on_host(call, blocks, None)
    for index in {reference.block for reference in call.results}:
        if blocks[index].numel():
            device().module.enqueue_copy(device().queue, buffers[index], _bytes(blocks[index]))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor as they lie in memory, in memory of their own: a call must not write to inputs."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _bytes(block: torch.Tensor) -> NDArray[np.uint8]:
    return block.view(torch.uint8).numpy() if block.dtype != torch.bool else block.numpy().view(np.uint8)
