"""Kernels outside of a model: compiled into one library with a harness that times them in turn.

A *variant* is one or several kernels that run one after the other. Before each timed run the harness puts the caches
into the state in which a model leaves them: the second level is swept, so that weights come from the last one, and then
the inputs are written, as their producer would.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.cost_model.regions import FLOAT_BYTES, Region
from sepc.backends.arguments import Result, Scratch
from sepc.backends.build import compile_objects, link
from sepc.backends.regions import LoweredKernel, lower, lower_chain
from sepc.backends.stages.vector import FloatArray
from sepc.cost_model.tiling import ChainTiling, Tiling
from sepc.passes.plan_memory import GAP_BYTES
from sepc.runtime.executable import aligned_bytes
from sepc.target import Target

CALLS_PER_TURN: Final = 3
TOLERANCE: Final = 1e-5
PAGE_BYTES: Final = 4096

_HARNESS: Final = """
typedef void (*variant_t)(char* const*, int32_t, int32_t);
static const variant_t variants[] = {{{names}}};

/* Seconds that variant number `variant` takes on `threads` threads. `b` are the arguments' addresses; each thread first
   reads its own `sweep_bytes` of `sweep` and rewrites its share of the `touched` first blocks. */
double measure(int32_t variant, char* const* b, const int64_t* bytes, int32_t touched, int32_t threads,
               const char* sweep, int64_t sweep_bytes) {{
  double elapsed = 0;
  #pragma omp parallel num_threads(threads)
  {{
    int32_t t = omp_get_thread_num(), n = omp_get_num_threads();
    int64_t sum = 0;
    for (int64_t i = t * sweep_bytes; i < (t + 1) * sweep_bytes; i += 64) sum += ((const volatile char*)sweep)[i];
    for (int32_t k = 0; k < touched; ++k) {{
      volatile char* block = b[k];
      int64_t lines = (bytes[k] + 63) / 64;
      for (int64_t line = lines * t / n; line < lines * (t + 1) / n; ++line) block[line * 64] = block[line * 64];
    }}
    #pragma omp barrier
    double start = omp_get_wtime();
    variants[variant](b, t, n);
    if (t == 0) elapsed = omp_get_wtime() - start;
  }}
  return elapsed;
}}
"""


@dataclass(frozen=True)
class Launch:
    """One kernel with the numbers of the buffers that it reads and writes."""

    kernel: LoweredKernel
    inputs: tuple[int, ...]
    result: int


Variant = Sequence[Launch]


def lower_region(region: Region, tiling: Tiling, lanes: int) -> LoweredKernel:
    """The kernel of `region`, which has one phase, under `tiling`."""
    if isinstance(tiling, ChainTiling):
        return lower_chain(region.graph, region.problems, tiling, lanes)
    (kernel,) = lower(region.graph, region.problems[0], tiling, lanes)
    return kernel


class Bench:
    """A library of variants over common buffers, of which the first `inputs` are filled with random numbers."""

    def __init__(
        self, variants: Sequence[Variant], buffer_elements: Sequence[int], inputs: int, target: Target, threads: int
    ) -> None:
        generator = np.random.default_rng(0)
        self.threads, self.inputs = threads, inputs
        self.blocks: list[FloatArray] = []
        for elements in buffer_elements:
            self._add(elements * FLOAT_BYTES)
        for block in self.blocks[:inputs]:
            block[:] = generator.standard_normal(block.size, dtype=np.float32)
        self._shared: dict[bytes, int] = {}
        self._scratch = -1
        bound = [[self._bind(launch) for launch in variant] for variant in variants]
        kernels = {launch.kernel.name: launch.kernel.function for variant in variants for launch in variant}
        names = [[launch.kernel.name for launch in variant] for variant in variants]
        with tempfile.TemporaryDirectory(prefix="sepc-benchmark-") as name:
            objects = compile_objects(kernels, target, Path(name))
            self._library = ctypes.CDLL(str(link(objects, harness_source(names, bound), Path(name))))
        self._library.measure.restype = ctypes.c_double
        self._addresses = (ctypes.c_void_p * len(self.blocks))(*[block.ctypes.data for block in self.blocks])
        self._bytes = (ctypes.c_int64 * max(1, inputs))(*[block.nbytes for block in self.blocks[:inputs]])
        second_level = target.machine.levels[1 if len(target.machine.levels) > 2 else 0]
        self._sweep_bytes = 2 * second_level.size_bytes
        self._sweep = aligned(self._sweep_bytes * threads)
        self._sweep[:] = 1

    def _bind(self, launch: Launch) -> list[int]:
        """The number of the block of each argument; equal constants share one."""
        blocks = []
        for argument in launch.kernel.arguments:
            if isinstance(argument, Result):
                blocks.append(launch.result)
            elif isinstance(argument, int):
                blocks.append(launch.inputs[argument])
            elif isinstance(argument, Scratch):
                blocks.append(self._scratch_block(argument.bytes_per_thread * self.threads))
            else:
                key = argument.tobytes()
                if key not in self._shared:
                    self._shared[key] = self._add(argument.nbytes)
                    self.blocks[-1][:] = argument.ravel()
                blocks.append(self._shared[key])
        return blocks

    def _scratch_block(self, size_bytes: int) -> int:
        """The block that serves all kernels as scratch, of at least that size."""
        if self._scratch < 0:
            self._scratch = self._add(size_bytes)
        elif self.blocks[self._scratch].nbytes < size_bytes:
            self.blocks[self._scratch] = _block(size_bytes, self._scratch)
        return self._scratch

    def _add(self, size_bytes: int) -> int:
        self.blocks.append(_block(size_bytes, len(self.blocks)))
        return len(self.blocks) - 1

    def run(self, variant: int) -> float:
        """Microseconds that one run of `variant` takes."""
        seconds = self._library.measure(
            ctypes.c_int32(variant),
            self._addresses,
            self._bytes,
            ctypes.c_int32(self.inputs),
            ctypes.c_int32(self.threads),
            ctypes.c_void_p(self._sweep.ctypes.data),
            ctypes.c_int64(self._sweep_bytes),
        )
        return float(seconds) * 1e6

    def times_us(self, variants: Sequence[int], rounds: int) -> dict[int, float]:
        """Time of each of `variants`, timed in turn: the median over rounds of the quickest of a few runs."""
        samples: dict[int, list[float]] = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant in variants:
                self.run(variant)
                samples[variant].append(min(self.run(variant) for _ in range(CALLS_PER_TURN)))
        return {variant: statistics.median(own) for variant, own in samples.items()}

    def disagreeing(self, variants: Sequence[int], result: int) -> list[int]:
        """Those of `variants` whose result (the buffer of that number) differs from the first one's."""
        wrong: list[int] = []
        reference: FloatArray | None = None
        for variant in variants:
            self.blocks[result][:] = np.nan
            self.run(variant)
            if reference is None:
                reference = self.blocks[result].copy()
                continue
            difference = np.nanmax(np.abs(self.blocks[result] - reference), initial=0.0)
            same_gaps = np.array_equal(np.isnan(self.blocks[result]), np.isnan(reference))
            if not same_gaps or difference > TOLERANCE * np.nanmax(np.abs(reference), initial=0.0):
                wrong.append(variant)
        return wrong


def aligned(size_bytes: int) -> NDArray[np.uint8]:
    """Bytes that start at a cache line, as compiled models have them, none of them uninitialised."""
    return aligned_bytes(size_bytes).numpy()


def _block(size_bytes: int, number: int) -> FloatArray:
    """Memory for block `number`: no two at equal offsets within a page, as in the arena of a compiled model."""
    skip = number * GAP_BYTES % PAGE_BYTES
    return aligned(skip + size_bytes)[skip:].view(np.float32)


def declarations(parameters: Mapping[str, int]) -> list[str]:
    """C declarations of kernels; `parameters` gives the number of pointers of each, by symbol."""
    return [f"int32_t {symbol}({'void*, ' * count}int32_t, int32_t);" for symbol, count in sorted(parameters.items())]


def harness_source(names: Sequence[Sequence[str]], bound: Sequence[Sequence[Sequence[int]]]) -> str:
    """The C source of the harness: for each variant the symbols of its kernels, and the blocks of their arguments."""
    parameters: dict[str, int] = {}
    functions: list[str] = []
    for index, (symbols, arguments) in enumerate(zip(names, bound, strict=True)):
        functions.append(f"static void variant_{index}(char* const* b, int32_t t, int32_t n) {{")
        for symbol, blocks in zip(symbols, arguments, strict=True):
            parameters[symbol] = len(blocks)
            functions.append(f"  {symbol}({''.join(f'b[{block}], ' for block in blocks)}t, n);")
            functions.append("  if (n > 1) {\n    #pragma omp barrier\n  }")
        functions.append("}")
    lines = ["#include <omp.h>", "#include <stdint.h>", *declarations(parameters), *functions]
    return "\n".join(lines) + _HARNESS.format(names=", ".join(f"variant_{index}" for index in range(len(names))))
