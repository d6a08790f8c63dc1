"""From device functions to what runs them: by OpenCL, or by CUDA's driver."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from sepc.backends.each import of_each
from sepc.backends.gpu.kernel import LAUNCH
from sepc.backends.gpu.languages import Language
from sepc.backends.gpu.nvcc import WORKERS, Cubin, Usage, compile_source, nvcc
from sepc.backends.gpu.source import source_of
from sepc.backends.program import Assembled, constants_of
from sepc.backends.stages.vector import Expr
from sepc.cost_model.gpu_machine import GpuMachine
from sepc.runtime.cuda import CudaExecutable
from sepc.runtime.executable import AnyExecutable
from sepc.runtime.gpu import Launch, Resources
from sepc.runtime.opencl import OpenClExecutable


def build(assembled: Assembled, machine: GpuMachine, language: Language) -> tuple[AnyExecutable, dict[str, float]]:
    """The executable of a program, and the seconds that each stage took.

    The constants of `assembled` are gone afterwards. Raises KernelError for kernels that have no form in the language,
    or that nvcc refuses; BuildError where that is missing, TargetError where it does not know the architecture.
    """
    started = time.perf_counter()
    functions, program = assembled.functions, assembled.program
    launches = {symbol: launch_of(function) for symbol, function in functions.items()}
    if language == "opencl":
        source = _one_source(functions, "opencl")
        opencl = OpenClExecutable(program, constants_of(assembled), source, launches)
        return opencl, {"kernels": time.perf_counter() - started}
    if functions:
        nvcc()  # Where it is missing, that is not for PyTorch to make up for.

    def compiled(symbol: str) -> Cubin:
        return compile_source(source_of({symbol: functions[symbol]}, language), machine.architecture)

    cubins = of_each(functions, compiled, WORKERS)
    code = {symbol: cubin.code for symbol, cubin in cubins.items()}
    resources = {
        symbol: resources_of(cubin.usage[symbol], launches[symbol], machine) for symbol, cubin in cubins.items()
    }
    cuda = CudaExecutable(program, constants_of(assembled), code, launches, resources)
    return cuda, {"kernels": time.perf_counter() - started}


def _one_source(functions: Mapping[str, Expr], language: Language) -> str:
    """One file for all functions; raises KernelError."""
    try:
        return source_of(functions, language)
    except Exception:  # As in `of_each`. Which of them is it?
        of_each(functions, lambda symbol: source_of({symbol: functions[symbol]}, language))
        raise


def launch_of(function: Expr) -> Launch:
    """How a device function is launched."""
    blocks, threads, shared_bytes = map(int, function.attrs[LAUNCH])
    element_bytes = tuple(np.dtype(str(one.ty.element_type.dtype)).itemsize for one in function.params)
    return Launch(blocks, threads, shared_bytes, element_bytes)


def resources_of(usage: Usage, launch: Launch, machine: GpuMachine) -> Resources:
    """What a kernel takes on `machine`."""
    shared_bytes = usage.shared_bytes + launch.shared_bytes
    blocks = machine.resident_blocks(launch.threads, usage.registers, shared_bytes)
    warps = blocks * -(-launch.threads // machine.warp_size)
    return Resources(usage.registers, usage.spilled_bytes, shared_bytes, warps / machine.warps)
