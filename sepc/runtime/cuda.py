"""Running a program on an NVIDIA GPU, on PyTorch's current stream, by CUDA's driver.

Inputs and results are PyTorch's tensors of that GPU, and so is the arena: nothing is copied, nothing waits, and no
memory is allocated but by PyTorch's own allocator, so that a call may be captured in a CUDA graph. (The first call
loads the kernels, which a capture cannot hold: call once before, as CUDA graphs want it anyway.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Array
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from sepc.errors import ArtifactError, DeviceError, InputError
from sepc.runtime.executable import run_on_host, view
from sepc.runtime.gpu import Launch, Resources
from sepc.runtime.program import HostCall, KernelCall, Program

ALIGNMENT_BYTES: Final = 16
"""Of what kernels load and store at once."""


@dataclass(frozen=True)
class CudaExecutable:
    """A program for one architecture of NVIDIA's GPUs.

    Attributes:
        program: what is run. constants: block 1, on the host.
        code: the machine code of each kernel, by symbol. launches: how it is launched. resources: what it takes.
    """

    program: Program
    constants: torch.Tensor
    code: Mapping[str, bytes]
    launches: Mapping[str, Launch]
    resources: Mapping[str, Resources]
    _loaded: dict[torch.device, _Loaded] = field(default_factory=dict)

    @property
    def library(self) -> bytes:
        """Not to be had: raises ArtifactError."""
        raise ArtifactError(
            "A model for a GPU cannot be saved",
            why="a saved model is a library for a CPU",
            fix="write it with export(directory)",
        )

    def run(self, inputs: Sequence[torch.Tensor], threads: int, stamps: Array[Any] | None = None) -> list[torch.Tensor]:
        """The program's results for `inputs`, tensors of one GPU; they are ready when its current stream gets there.

        `threads` and `stamps` are for CPUs; see `profile`. Raises InputError for tensors that are elsewhere,
        DeviceError where CUDA fails.
        """
        return self._run(inputs, None)

    def profile(self, inputs: Sequence[torch.Tensor], threads: int, repeats: int) -> dict[str, float]:
        """Median time of each region over `repeats` runs, in microseconds, by the region's name."""
        samples: dict[str, list[float]] = {name: [] for name in self.program.calls}
        for _ in range(repeats):
            events = [_event() for _ in range(self.program.number_of_calls + 1)]
            self._run(inputs, events)
            events[-1].synchronize()
            for name, (first, end) in self.program.calls.items():
                samples[name].append(events[first].elapsed_time(events[end]) * 1e3)
        return {name: sorted(times)[len(times) // 2] for name, times in samples.items()}

    def _run(self, inputs: Sequence[torch.Tensor], events: Sequence[torch.Event] | None) -> list[torch.Tensor]:
        device = _device_of(inputs)
        with torch.cuda.device(device):
            loaded = self._loaded_on(device)
            stream = torch.cuda.current_stream().cuda_stream
            arena = torch.empty(self.program.arena_bytes, dtype=torch.uint8, device=device)
            storages = [torch.empty(one.elements, dtype=one.dtype, device=device) for one in self.program.storages]
            blocks = [arena, loaded.constants, *map(_aligned, inputs), *storages]
            addresses = [block.data_ptr() for block in blocks]
            if events:
                events[0].record()
            for step in loaded.steps:
                if isinstance(step, HostCall):
                    run_on_host(step, blocks, None)
                    if events:
                        events[step.number + 1].record()
                    continue
                for call in step:
                    loaded.launch(call, self.launches[call.symbol], addresses, stream)
                    if events:
                        events[call.number + 1].record()
            return [view(reference, blocks) for reference in self.program.results]

    def _loaded_on(self, device: torch.device) -> _Loaded:
        """The kernels and constants on a GPU, loaded at the first call; several threads may each load them then."""
        if device not in self._loaded:
            self._loaded[device] = _Loaded.on(device, self)
        return self._loaded[device]


@dataclass(frozen=True)
class _Loaded:
    """What a GPU holds of a program.

    Attributes:
        driver: the binding. functions: the kernels, by symbol; they live as long as the process.
        constants: block 1. steps: those of the program, with what PyTorch reads there.
    """

    driver: Any
    functions: Mapping[str, Any]
    constants: torch.Tensor
    steps: Sequence[list[KernelCall] | HostCall]

    @staticmethod
    def on(device: torch.device, executable: CudaExecutable) -> _Loaded:
        """Load them in the context of PyTorch's, which must be current."""
        driver = _driver()
        constants = executable.constants.to(device)  # Also makes the context current.
        functions = {}
        for symbol, code in executable.code.items():
            module = checked(driver, driver.cuModuleLoadData(code))
            functions[symbol] = checked(driver, driver.cuModuleGetFunction(module, symbol.encode()))
            shared_bytes = executable.launches[symbol].shared_bytes
            if shared_bytes:
                limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                checked(driver, driver.cuFuncSetAttribute(functions[symbol], limit, shared_bytes))
        steps = [_on_device(step, device) if isinstance(step, HostCall) else step for step in executable.program.steps]
        return _Loaded(driver, functions, constants, steps)

    def launch(self, call: KernelCall, launch: Launch, addresses: Sequence[int], stream: int) -> None:
        """Put a kernel on a stream."""
        pointers = tuple(addresses[pointer.block] + pointer.offset_bytes for pointer in call.arguments)
        arguments = (pointers, (ctypes.c_void_p,) * len(pointers))
        grid, block = (launch.blocks, 1, 1), (launch.threads, 1, 1)
        function = self.functions[call.symbol]
        done = self.driver.cuLaunchKernel(function, *grid, *block, launch.shared_bytes, stream, arguments, 0)
        checked(self.driver, done)


def _driver() -> Any:
    """CUDA's driver, from Python; raises DeviceError where the binding or the driver is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            "CUDA's driver cannot be called", why=str(error), fix="pip install 'sepc[cuda]' (that is cuda-bindings)"
        ) from error
    return driver


def checked(driver: Any, outcome: tuple[Any, ...]) -> Any:
    """What a call of the driver returned; raises DeviceError where it failed."""
    error, *values = outcome
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError("CUDA's driver failed", why=error.name, fix="see whether the GPU is there, and has memory")
    return values[0] if values else None


def _event() -> torch.Event:
    """A point on a stream whose time will be known."""
    return torch.Event("cuda", enable_timing=True)


def _on_device(call: HostCall, device: torch.device) -> HostCall:
    """`call` with its constants on a GPU."""
    constants = tuple(constant.to(device) for constant in call.graph.constants)
    return replace(call, graph=replace(call.graph, constants=constants))


def _device_of(inputs: Sequence[torch.Tensor]) -> torch.device:
    """The GPU that all inputs are on, the current one where there are none; raises InputError if there is no such."""
    devices = {tensor.device for tensor in inputs} or {torch.device("cuda", torch.cuda.current_device())}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        raise InputError("The inputs are not on one GPU", why=f"they are on {found}", fix="move them: x.cuda()")
    return devices.pop()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if it begins where no vector can be loaded: it is a part of a larger one."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor
