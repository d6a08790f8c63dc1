"""What the kernels of whole models take on NVIDIA's GPUs, as their assembler tells; no GPU is needed.

    python -m benchmarks.gpu                                       # all tested models, for all listed architectures
    python -m benchmarks.gpu mobilenetv2_100 --architecture sm_80  # one, with a line for each kernel
    python -m benchmarks.gpu mobilenetv2_100 --dtype float16       # in halves, with sums in float32

Each kernel is compiled by nvcc. Registers that do not fit are spilled to memory, which no kernel should do; occupancy
is the share of a multiprocessor's warps that can be there at a time. Times are the cost model's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import sepc
from benchmarks.models import TESTED, load
from sepc.bench.report import describe_versions
from sepc.ir.element import ElementName
from sepc.runtime.report import RegionReport

ARCHITECTURES: Final = ("sm_75", "sm_80", "sm_90")
RESULTS: Final = Path(__file__).parent / "results" / "gpu_kernels.txt"


@dataclass(frozen=True)
class Compiled:
    """A model compiled for an architecture: its regions."""

    model: str
    architecture: str
    regions: Sequence[RegionReport]

    @property
    def row(self) -> str:
        """A line of the table."""
        found = [one for region in self.regions for one in region.resources]
        in_pytorch = sum(region.kernel == "torch" for region in self.regions)
        spilling = sum(one.spilled_bytes > 0 for one in found)
        return (
            f"{self.model:30} {self.architecture:6} {len(found):7} {in_pytorch:10} {spilling:9} "
            f"{max(one.registers for one in found):9} {max(one.shared_bytes for one in found) / 1024:8.1f} "
            f"{statistics.median(one.occupancy for one in found):9.0%} {min(one.occupancy for one in found):7.0%}"
        )

    @property
    def predicted(self) -> str:
        """The predicted time, all of it and by what bounds it."""
        times_us: dict[str, float] = {}
        for region in self.regions:
            if region.bottleneck:
                times_us[region.bottleneck] = times_us.get(region.bottleneck, 0.0) + region.predicted_us
        parts = ", ".join(f"{name} {times_us[name]:.0f}" for name in sorted(times_us, key=lambda one: -times_us[one]))
        total_us = sum(times_us.values())
        return f"{self.model}, {self.architecture}: predicted {total_us:.0f} µs, by what bounds it: {parts}"

    @property
    def details(self) -> list[str]:
        """A line for each kernel: its region, tiling, and what it takes."""
        return [
            f"  {region.name:34} {one}; {region.tiling}"
            for region in self.regions
            for one in dict.fromkeys(region.resources)
        ]


HEAD: Final = (
    f"{'model':30} {'target':6} {'kernels':>7} {'in PyTorch':>10} {'that spill':>9} {'registers':>8} {'KiB shared':>8} "
    f"{'occupancy':>8} {'least':>6}"
)


def compile_for(model: str, architecture: str, size: int | None, dtype: ElementName) -> Compiled:
    """`model` compiled for an architecture at batch 1."""
    module, inputs = load(model, size)
    fast = sepc.compile(module, target=f"cuda:{architecture}", dtype=dtype, example_inputs=inputs)
    return Compiled(model, architecture, fast.regions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per model and architecture; the exit status is 1 if any kernel spills."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("models", nargs="*", default=TESTED)
    parser.add_argument("--architecture", action="append", help="one of these only; may be repeated")
    parser.add_argument("--size", type=int, help="side of the images in pixels; else that of each model")
    parser.add_argument("--dtype", choices=get_args(ElementName), default="float32", help="the type of its kernels")
    parser.add_argument("--output", type=Path, help=f"where to write it; all of it goes to {RESULTS.name}")
    options = parser.parse_args(arguments)
    lines, details, spilling = [HEAD], list[str](), 0
    print(HEAD, flush=True)
    for model in options.models:
        for architecture in options.architecture or ARCHITECTURES:
            compiled = compile_for(model, architecture, options.size, options.dtype)
            print(compiled.row, flush=True)
            lines.append(compiled.row)
            details += ["", compiled.predicted, *compiled.details]
            spilling += any(one.spilled_bytes for region in compiled.regions for one in region.resources)
    everything = tuple(options.models) == TESTED and not (options.architecture or options.size)
    everything &= options.dtype == "float32"
    if path := options.output or (RESULTS if everything else None):
        versions = ", ".join(f"{name} {version}" for name, version in describe_versions().items())
        path.write_text("\n".join([*lines, "", versions, *details, ""]), encoding="utf-8")
    else:
        print("\n".join(details))
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
