"""What a model takes as a C bundle: bytes of code, weights and arena, symbols, and instructions for one inference.

    python -m benchmarks.bundle mobilenetv2_100 --target arm64

The bundle is built with all warnings as errors, for the target and for this host, where it runs with AddressSanitizer
and UBSan and is compared with eager. Instructions are counted by a plugin of QEMU's user emulation, which Debian's
`qemu-user` can load and its `qemu-user-static` cannot: the difference between one inference and two. What cannot be had
is told.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

import sepc
from benchmarks import models
from benchmarks.compare import RESULTS
from sepc.c_compiler import c_compiler, cross_compiler
from sepc.target import Target

WARNINGS: Final = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
SANITIZERS: Final = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PLUGIN: Final = Path(__file__).with_name("count_instructions.c")
TOLERANCE: Final = 1e-4
HOST_TARGET: Final = "x86-64-v3"
NAME: Final = "net"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write it to results/bundle.txt; 1 if something is wrong with the bundle."""
    options = parse(arguments)
    lines, is_well = report(options.model, options.size, options.target, options.qemu)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.output:
        options.output.write_text(text)
    return 0 if is_well else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Size and cost of a model as a C bundle.")
    parser.add_argument("model")
    parser.add_argument("--target", default="arm64")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the image (default: the model's own)")
    parser.add_argument("--qemu", default="qemu-aarch64", metavar="PROGRAM", help="an emulator that loads plugins")
    parser.add_argument("--output", type=Path, default=RESULTS / "bundle.txt", metavar="FILE")
    return parser.parse_args(arguments)


def report(name: str, size: int | None, target_name: str, qemu: str) -> tuple[list[str], bool]:
    """The lines of the table, and whether all is well."""
    model, inputs = models.load(name, size)
    target = Target.parse(target_name)
    with torch.inference_mode():
        expected = model(*inputs)
    lines = [f"{name}, input {list(inputs[0].shape)}, one thread, target {target.text}, sepc {sepc.__version__}", ""]
    with tempfile.TemporaryDirectory(prefix="sepc-") as directory:
        place = Path(directory)
        compiled = sepc.compile(model, target=target, num_threads=1, example_inputs=inputs)
        compiled.export(place / "target", name=NAME)
        program = build(place / "target", cross_compiler(target), "-O1", "-static")
        sections = section_bytes(place / "target" / "kernels.o", cross_compiler(target))
        weights = (place / "target" / "weights.bin").stat().st_size
        rows = {
            "kernels, code": f"{sections['code']:,} bytes",
            "kernels, constants": f"{sections['constants']:,} bytes",
            "weights": f"{weights:,} bytes",
            "arena": f"{compiled.arena_bytes:,} bytes",
            "program, linked statically": f"{program.stat().st_size:,} bytes",
            "undefined symbols of the bundle": ", ".join(undefined(place / "target", cross_compiler(target))) or "none",
            "compiler's warnings (-Wall -Wextra -Wpedantic -Wconversion)": "none",
            "instructions of one inference": instructions(program, inputs, place, qemu),
        }
        error = sanitized_error(model, inputs, expected, place / "host")
    is_right = error <= TOLERANCE
    rows[f"AddressSanitizer and UBSan, {HOST_TARGET}"] = "nothing found"
    verdict = "agrees" if is_right else "DIFFERS"
    rows[f"largest difference from eager, {HOST_TARGET}"] = f"{error:.1e} of the largest output: {verdict}"
    width = max(map(len, rows))
    return [*lines, *(f"{label:{width}}  {value}" for label, value in rows.items())], is_right


def build(directory: Path, compiler: str, *flags: str) -> Path:
    """The program of a bundle, built without a warning; raises CalledProcessError if that cannot be."""
    sources = sorted(one.name for one in directory.iterdir() if one.suffix in (".c", ".S", ".o"))
    command = [compiler, *WARNINGS, *flags, "-pthread", "-I.", "-o", f"{NAME}.bin", *sources, "-lm"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / f"{NAME}.bin"


def section_bytes(path: Path, compiler: str) -> dict[str, int]:
    """Bytes of code and of constants in an object file."""
    shown = run([tool(compiler, "size"), "-A", str(path)])
    found = {"code": 0, "constants": 0}
    for line in shown.splitlines():
        if match := re.match(r"\.(text|rodata)\S*\s+(\d+)", line):
            found["code" if match[1] == "text" else "constants"] += int(match[2])
    return found


def undefined(directory: Path, compiler: str) -> list[str]:
    """What kernels and entry point, linked with each other, want of other libraries."""
    objects = ["kernels.o"]
    for source in (f"{NAME}.c", "weights.S"):
        subprocess.run([compiler, "-O1", "-I.", "-c", source, "-o", f"{source}.part"], cwd=directory, check=True)
        objects.append(f"{source}.part")
    subprocess.run([compiler, "-r", "-nostdlib", "-o", "whole.part", *objects], cwd=directory, check=True)
    shown = run([tool(compiler, "nm"), "-u", str(directory / "whole.part")])
    return [line.split()[-1] for line in shown.splitlines()]


def instructions(program: Path, inputs: Sequence[torch.Tensor], directory: Path, qemu: str) -> str:
    """How many instructions one inference executes, and how many of them are multiply-adds of vectors; or why not."""
    emulator = shutil.which(qemu)
    if emulator is None:
        return f"not counted: {qemu} is not installed (Debian: apt install qemu-user)"
    plugin = directory / "plugin.so"
    run([c_compiler(), "-shared", "-fPIC", "-O2", "-o", str(plugin), str(PLUGIN)])
    files = [str(directory / f"input{index}") for index in range(len(inputs))]
    for file, tensor in zip(files, inputs, strict=True):
        tensor.numpy().tofile(file)
    counts = []
    for repeats in ("0", "1"):
        command = [
            emulator,
            "-plugin",
            f"file={plugin}",
            str(program),
            "-r",
            repeats,
            *files,
            str(directory / "output"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"not counted: {(done.stderr.strip().splitlines() or ['the emulator failed'])[-1]}"
        counts.append({key: int(value) for key, value in re.findall(r"(\w+) (\d+)", done.stderr)})
    once, twice = counts
    every, useful = (twice[name] - once[name] for name in ("instructions", "multiply_adds"))
    return f"{every:,}, of which {useful:,} ({useful / every:.0%}) are multiply-adds of vectors"


def sanitized_error(
    model: torch.nn.Module, inputs: Sequence[torch.Tensor], expected: torch.Tensor, directory: Path
) -> float:
    """How far the bundle for this host is from eager, run with sanitizers, which raise CalledProcessError."""
    sepc.compile(model, target=HOST_TARGET, num_threads=1, example_inputs=inputs).export(directory, name=NAME)
    program = build(directory, c_compiler(), "-O1", *SANITIZERS)
    files = [directory / f"input{index}" for index in range(len(inputs))]
    for file, tensor in zip(files, inputs, strict=True):
        tensor.numpy().tofile(file)
    subprocess.run([program, *files, directory / "output"], check=True, env={**os.environ, "ASAN_OPTIONS": ""})
    found = torch.from_numpy(np.fromfile(directory / "output", np.float32))
    return float((found - expected.flatten()).abs().max() / expected.abs().max())


def tool(compiler: str, name: str) -> str:
    """The tool that goes with a compiler."""
    prefix = compiler.removesuffix("gcc") if compiler.endswith("-gcc") else ""
    return prefix + name


def run(command: Sequence[str]) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
