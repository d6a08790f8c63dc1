"""Write MobileNetV2 as C for this host and for 64-bit Arm, build both with CMake, run them, compare with PyTorch.

    python examples/deploy_c.py [--model NAME] [--size N] [--targets NAME ...] [--output DIR]

What is written needs a C compiler and nothing else. The program for Arm is built by the cross compiler, and runs under
QEMU's user emulation, which tells whether it is right, not how fast it is (Debian: apt install cmake
gcc-aarch64-linux-gnu qemu-user-static). Prints the files, the commands as one would type them, and how far the results
are from PyTorch's. The exit status is 1 if they are too far. Weights are random: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import timm
import torch
from torch import nn

import sepc
from sepc.bundle.emulation import emulator
from sepc.c_compiler import cross_compiler

TOLERANCE: Final = 1e-4
NAME: Final = "net"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if all programs agree with PyTorch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100", help="a model of timm (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", default=["native", "arm64:cortex-a72"], help="default: %(default)s")
    output = Path(__file__).parent / "output" / "deploy_c"
    parser.add_argument("--output", type=Path, default=output, help="default: examples/output/deploy_c")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    image = torch.randn(1, 3, options.size, options.size)
    with torch.inference_mode():
        expected = model(image)
    agreed = []
    for name in options.targets:
        target = sepc.Target.parse(name)
        directory = options.output / name.replace(":", "-")
        export(model, image, target, directory)
        result = run(build(target, directory), target, image).reshape(expected.shape)
        difference = float((result - expected).abs().max() / expected.abs().max())
        agreed.append(difference <= TOLERANCE)
        print(f"  {difference:.1e} of the largest value from PyTorch: {'agrees' if agreed[-1] else 'DISAGREES'}")
    return 0 if all(agreed) else 1


def export(model: nn.Module, image: torch.Tensor, target: sepc.Target, directory: Path) -> None:
    """Write the C sources, the kernels and the weights."""
    fast = sepc.compile(model, target=target, num_threads=1, example_inputs=(image,))
    print(f"{target.text}: {directory}, works in an arena of {fast.arena_bytes:,} bytes")
    for path in fast.export(directory, name=NAME):
        print(f"  {path.name:14} {path.stat().st_size:12,} bytes")


def build(target: sepc.Target, directory: Path) -> Path:
    """The program, built as the bundle's README says; for another architecture by its compiler, linked statically."""
    foreign = not target.is_of_host_architecture
    cross = [
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={target.machine.architecture}",
        f"-DCMAKE_C_COMPILER={cross_compiler(target)}",
        f"-DCMAKE_ASM_COMPILER={cross_compiler(target)}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    ]
    call(["cmake", "-S", ".", "-B", "build", *(cross if foreign else [])], directory)
    call(["cmake", "--build", "build"], directory)
    return directory / "build" / f"{NAME}_main"


def run(program: Path, target: sepc.Target, image: torch.Tensor) -> torch.Tensor:
    """What the program makes of `image`, flat; it reads and writes files of raw numbers."""
    directory = program.parents[1]
    image.numpy().tofile(directory / "input.bin")
    prefix = [] if target.is_of_host_architecture else [emulator(target)]
    call([*prefix, f"build/{program.name}", "input.bin", "output.bin"], directory)
    return torch.from_numpy(np.fromfile(directory / "output.bin", np.float32))


def call(command: Sequence[str], directory: Path) -> None:
    """Print a command and run it in `directory`; raises CalledProcessError if it fails."""
    print(f"  $ {shlex.join(command)}")
    subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
