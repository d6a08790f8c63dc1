"""From device functions to what runs them: by OpenCL, or by CUDA's driver."""

from __future__ import annotations

import time

import numpy as np

from sepc.backends.gpu.kernel import LAUNCH
from sepc.backends.gpu.source import source_of
from sepc.backends.program import Assembled, constants_of
from sepc.backends.stages.vector import Expr
from sepc.runtime.executable import AnyExecutable
from sepc.runtime.gpu import Launch
from sepc.runtime.opencl import OpenClExecutable
from sepc.target import Target


def build(assembled: Assembled, target: Target) -> tuple[AnyExecutable, dict[str, float]]:
    """The executable of a program, and the seconds that each stage took.

    The constants of `assembled` are gone afterwards. Raises BuildError where nvcc is missing or fails.
    """
    started = time.perf_counter()
    source = source_of(assembled.functions, "opencl")
    launches = {symbol: launch_of(function) for symbol, function in assembled.functions.items()}
    executable = OpenClExecutable(assembled.program, constants_of(assembled), source, launches)
    return executable, {"kernels": time.perf_counter() - started}


def launch_of(function: Expr) -> Launch:
    """How a device function is launched."""
    blocks, threads = map(int, function.attrs[LAUNCH])
    element_bytes = tuple(np.dtype(str(one.ty.element_type.dtype)).itemsize for one in function.params)
    return Launch(blocks, threads, 0, element_bytes)
