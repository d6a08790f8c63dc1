"""How near compiled models come to the time that their multiply-adds alone would take on one core.

    python -m benchmarks.fma_bound mobilenetv1_100 mobilenetv2_100 efficientnet_lite0

The bound is what a loop of independent fused multiply-adds on registers, with as many as the model has, takes on the
same core, timed in turn with the model, round after round. Multiply-adds are those of the model as it is given,
convolutions and matrix products counted by PyTorch: where sepc finds ways to need fewer, it can beat the bound.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch.utils.flop_counter import FlopCounterMode

import sepc
from benchmarks import models
from sepc.bench.measure import TOLERANCE, relative_error
from sepc.c_compiler import c_compiler
from sepc.target import Target

CHAINS: Final = 24
"""Independent accumulators: more than latency times throughput of any x86 core."""
SOURCE: Final = """
typedef float vector __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
void multiply_adds(long rounds, float* out) {
  vector sums[CHAINS], factor, one;
  for (int i = 0; i < VECTOR_BYTES / 4; ++i) factor[i] = out[0], one[i] = out[1];
#pragma GCC unroll 24
  for (int chain = 0; chain < CHAINS; ++chain) {
    sums[chain] = one;
    __asm__ volatile("" : "+x"(sums[chain])); /* or all chains would be known to be one and the same */
  }
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = sums[chain] * factor + one;
  }
#pragma GCC unroll 24
  for (int chain = 1; chain < CHAINS; ++chain) sums[0] += sums[chain];
  *(vector*)out = sums[0];
}
"""
TURN_S: Final = 0.15


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per model; the exit status is 1 if any result is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fma_bound", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a timm model")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each (default: 15)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loop = multiply_add_loop(Target.parse("native").vector_lanes)
    right = True
    for name in options.models:
        model, inputs = models.load(name)
        multiply_adds = count_multiply_adds(model, inputs)
        with torch.inference_mode():
            compiled = sepc.compile(model, example_inputs=inputs, num_threads=1)
            error = relative_error([compiled(*inputs)], [model(*inputs)])
            own, bound = in_turn([partial(compiled, *inputs), partial(loop, multiply_adds)], options.rounds)
        share = statistics.median(b / o for o, b in zip(own, bound, strict=True))
        right &= error <= TOLERANCE
        print(
            f"{name}: {multiply_adds / 1e6:.0f} M multiply-adds, bound {statistics.median(bound):.2f} ms, "
            f"sepc {statistics.median(own):.2f} ms: {share:.1%} of the bound; error {error:.1e}",
            flush=True,
        )
    return 0 if right else 1


def multiply_add_loop(lanes: int) -> Callable[[int], None]:
    """A function that does so many multiply-adds on registers, in vectors of `lanes`."""
    with tempfile.TemporaryDirectory(prefix="sepc-") as directory:
        source, library = Path(directory) / "bound.c", Path(directory) / "bound.so"
        source.write_text(SOURCE)
        sizes = [f"-DVECTOR_BYTES={4 * lanes}", f"-DCHAINS={CHAINS}", f"-mprefer-vector-width={32 * lanes}"]
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", *sizes]
        subprocess.run([c_compiler(), *flags, "-o", str(library), str(source)], check=True)
        function = ctypes.CDLL(str(library)).multiply_adds
    function.restype, function.argtypes = None, [ctypes.c_long, ctypes.c_void_p]
    out = (ctypes.c_float * lanes)(1.0, 0.0)

    def run(multiply_adds: int) -> None:
        out[0], out[1] = 0.5, 1.0
        function(multiply_adds // (CHAINS * lanes), out)

    return run


def count_multiply_adds(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Multiply-adds of the convolutions and matrix products of one inference."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def in_turn(functions: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """The median time in milliseconds of each function in each round."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, own in zip(functions, times, strict=True):
            own.append(_median_ms(function))
    return times


def _median_ms(function: Callable[[], object]) -> float:
    samples: list[float] = []
    end_s = time.perf_counter() + TURN_S
    function()
    while len(samples) < 3 or time.perf_counter() < end_s:
        start_ns = time.perf_counter_ns()
        function()
        samples.append((time.perf_counter_ns() - start_ns) / 1e6)
    return statistics.median(samples)


if __name__ == "__main__":
    sys.exit(main())
