"""Models in float16: whether they are right, run from their C bundles under emulation, and how small they are.

    python -m benchmarks.float16 mobilenetv2_100 convnext_tiny --target arm64:neoverse-n1

Each model, with the seeded random parameters of `benchmarks.models`, is compiled in float32 and in float16, exported as
C, built by the cross compiler and run by QEMU on one image; all regions must be kernels. What is told: the error of the
results against eager in float32, relative to the largest, whether the largest is the same one (top-1), and the bytes of
weights and arena. Emulation says nothing of time: see `benchmarks.inner_loops`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

import sepc
from benchmarks import models
from benchmarks.compare import RESULTS
from sepc.bundle import emulation
from sepc.c_compiler import cross_compiler, run_compiler
from sepc.ir.element import ELEMENTS, ElementName

SIZES: Final = {"mobilenetv2_100": 224, "efficientnet_lite0": 224, "convnext_tiny": 96, "fasternet_t0": 224}
"""Models, and the side of the image that each is run on: smaller where emulation is slow."""
TOLERANCES: Final[dict[ElementName, float]] = {"float32": 1e-4, "float16": 2e-2}
NAME: Final = "net"


@dataclass(frozen=True)
class Row:
    """What came of a model in one type."""

    dtype: str
    error: float
    same_top_1: bool
    weights_bytes: int
    arena_bytes: int

    def __str__(self) -> str:
        top = "same" if self.same_top_1 else "ANOTHER"
        sizes = f"{self.weights_bytes / 1e6:6.1f} MB of weights, arena {self.arena_bytes / 1e6:5.2f} MB"
        return f"{self.dtype}  error {self.error:.1e}  {top} top-1  {sizes}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write a table; the exit status is 1 if a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.float16", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="*", default=list(SIZES), help=f"timm models; by default {', '.join(SIZES)}")
    parser.add_argument("--target", default="arm64:cortex-a76", help="a 64-bit Arm core (default: %(default)s)")
    parser.add_argument("--size", type=int, help="side of the image (default: by model)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    lines, wrong = [], 0
    for name in options.models:
        size = options.size or SIZES.get(name, models.DEFAULT_SIZE)
        for dtype, tolerance in TOLERANCES.items():
            row = measure(name, size, options.target, dtype)
            wrong += not (row.same_top_1 and row.error <= tolerance)
            lines.append(f"{options.target}  {name:20} {size}×{size}  {row}")
            print(lines[-1], flush=True)
    (options.output / "float16.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def measure(name: str, size: int, target: str, dtype: ElementName) -> Row:
    """Compile, export, build and run a model."""
    model, inputs = models.load(name, size)
    with torch.inference_mode():
        expected = model(*inputs).flatten()
    compiled = sepc.compile(model, target=target, dtype=dtype, num_threads=1, fullgraph=True, example_inputs=inputs)
    with tempfile.TemporaryDirectory(prefix="sepc-") as directory:
        path = Path(directory)
        compiled.export(path, name=NAME)
        found = run(path, compiled.target, inputs)
        weights_bytes = (path / "weights.bin").stat().st_size
    error = float((found - expected).abs().max() / expected.abs().max())
    same = bool(found.argmax() == expected.argmax())
    return Row(ELEMENTS[dtype].name, error, same, weights_bytes, compiled.arena_bytes)


def run(bundle: Path, target: sepc.Target, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the program of the exported `bundle` gives for `inputs`, under emulation."""
    sources = ["main.c", f"{NAME}.c", "weights.S", "kernels.o"]
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-static", "-I.", "-o", NAME]
    run_compiler([cross_compiler(target), *flags, *sources, "-lm"], bundle)
    names = [f"input{index}" for index in range(len(inputs))]
    for one, tensor in zip(names, inputs, strict=True):
        (bundle / one).write_bytes(tensor.numpy().tobytes())
    subprocess.run([emulation.emulator(target), NAME, *names, "output"], cwd=bundle, check=True)
    return torch.from_numpy(np.fromfile(bundle / "output", np.float32))


if __name__ == "__main__":
    sys.exit(main())
