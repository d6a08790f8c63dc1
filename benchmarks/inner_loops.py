"""How near the innermost loops of convolutions come to their multiply-adds' bound on cores that are not at hand.

    python -m benchmarks.inner_loops --targets arm64:cortex-a72 arm64:neoverse-n1 --models mobilenetv2_100
    python -m benchmarks.inner_loops --dtype float16

LLVM's machine code analyser (`llvm-mca`, Debian: apt install llvm-19) simulates the loop with most products of
each kernel, its data in the first-level cache, by LLVM's model of the core. The bound is what the same analyser says of
these multiply-adds alone, without anything that they depend on. Models of several cores are one in LLVM: that of a
Cortex-A57 stands for A72 and A76 as well. That has no arithmetic in float16: of loops in it, an A76's are judged by the
model of a Neoverse N1, which is of the same pipelines (Arm's optimization guides of both). Vectors loaded from or
stored to the stack in such a loop are counted: none should be. Products of halves need an eighth fewer multiply-adds
than the layer has, which is not counted here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

import sepc
from benchmarks import models
from benchmarks.compare import RESULTS
from sepc.ir.element import ElementName

TARGETS: Final = {
    "float32": ("arm64:cortex-a72", "arm64:cortex-a76", "arm64:neoverse-n1"),
    "float16": ("arm64:cortex-a76", "arm64:neoverse-n1"),
}
MODELS_OF_CORES: Final = {("cortex-a76", "float16"): "neoverse-n1"}
"""The core by whose model another one's loops are judged."""
ARRANGEMENTS: Final = {"float32": "4s", "float16": "8h"}
"""How assembly calls full vectors of a type."""
MODELS: Final = ("mobilenetv2_100", "fasternet_t0")
ITERATIONS: Final = 200
OLDEST_LLVM: Final = 16
MULTIPLY_ADD: Final = re.compile(r"\s+fmla\s+v")
BY_ELEMENT: Final = re.compile(r"\s+fmla\s+v.*\.[hs]\[\d\]")
STACK_VECTOR: Final = re.compile(r"\s+(ldr|ldp|str|stp)\s+[qsd]\d.*\[sp")
BRANCH: Final = re.compile(r"\s+(?:b|b\.\w+|cbn?z\s+\w+,|tbn?z\s+[^.]*,)\s+(\.L\w+)")
LABEL: Final = re.compile(r"(\.L\w+):")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, and the shape of its input."""

    kind: str
    text: str
    module: nn.Module
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """What the analyser says of the innermost loop of a kernel."""

    multiply_adds: int
    cycles: float
    bound_cycles: float
    stack_accesses: int

    @property
    def share(self) -> float:
        """Of the bound."""
        return self.bound_cycles / self.cycles


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write a table; the exit status is 1 if a pointwise or dense loop uses the stack."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inner_loops", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--targets", nargs="+", metavar="TARGET", help="64-bit Arm cores")
    parser.add_argument("--dtype", choices=ARRANGEMENTS, default="float32", help="the type in which kernels compute")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL", help="timm models")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    lines, missed = [], 0
    layers = {text: layer for name in options.models for text, layer in layers_of(name).items()}
    for target in options.targets or TARGETS[options.dtype]:
        shares: dict[str, list[float]] = {}
        for layer in layers.values():
            tiling, found = measure(layer, target, options.dtype)
            shares.setdefault(layer.kind, []).append(found.share)
            missed += found.stack_accesses > 0 and layer.kind in ("dense", "pointwise")
            lines.append(
                f"{target:18} {layer.text:34} {found.multiply_adds:4} multiply-adds, {found.cycles:6.1f} cycles, "
                f"{found.share:6.1%} of the bound, {found.stack_accesses} stack; {tiling}"
            )
            print(lines[-1], flush=True)
        for kind, own in shares.items():
            lines.append(f"{target:18} {kind}: {len(own)} layers, {min(own):.1%} of the bound at least")
            print(lines[-1], flush=True)
    name = "inner_loops.txt" if options.dtype == "float32" else f"inner_loops_{options.dtype}.txt"
    (options.output / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if missed else 0


def layers_of(name: str) -> dict[str, Layer]:
    """The different convolutions and linear layers of a timm model, by what tells them apart."""
    model, inputs = models.load(name)
    found: dict[str, Layer] = {}

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        layer = _layer(module, tuple(given[0].shape))
        found.setdefault(layer.text, layer)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(*inputs)
    return found


def _layer(module: nn.Module, shape: tuple[int, ...]) -> Layer:
    if not isinstance(module, nn.Conv2d):
        rows = torch.Size(shape[:-1]).numel()
        return Layer("pointwise", f"linear {shape[-1]} → {module.out_features}, {rows} rows", module, shape)
    kernel = "×".join(map(str, module.kernel_size))
    if module.groups > 1:
        kind = "depthwise" if module.groups == module.in_channels else "grouped"
    else:
        kind = "pointwise" if kernel == "1×1" else "dense"
    stride = "" if module.stride == (1, 1) else f" /{module.stride[0]}"
    text = f"{kernel}{stride} {kind} {module.in_channels} → {module.out_channels}, {shape[2]}×{shape[3]}"
    return Layer(kind, text, module, shape)


def measure(layer: Layer, target: str, dtype: ElementName = "float32") -> tuple[str, Found]:
    """The tiling of the layer's kernel, with a ReLU, and what the analyser says of its innermost loop."""
    # A model in the kernels' own type, so that no conversions are among the loops.
    own = getattr(torch, dtype)
    x = torch.randn(layer.shape, dtype=own)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    model = nn.Sequential(deepcopy(layer.module).to(own), nn.ReLU()).eval()
    compiled = sepc.compile(model, target=target, dtype=dtype, num_threads=1, example_inputs=(x,))
    region = max((one for one in compiled.regions if one.symbols), key=lambda one: one.flops)
    loops = list(innermost_loops(compiled.source(region, "asm")))
    return region.tiling, analyse(max(loops, key=_products), compiled.target.llvm_cpu, dtype)


def innermost_loops(assembly: str) -> Iterator[list[str]]:
    """The instructions of each loop without another one inside."""
    lines = assembly.splitlines()
    labels = {match.group(1): number for number, line in enumerate(lines) if (match := LABEL.match(line))}
    branches = [(number, match.group(1)) for number, line in enumerate(lines) if (match := BRANCH.match(line))]
    loops = [(labels[label], number) for number, label in branches if labels.get(label, number) < number]
    for first, last in loops:
        if not any(first <= start and end < last for start, end in loops):
            body = lines[first + 1 : last]
            yield [line for line in body if re.match(r"\s+[a-z]", line) and not BRANCH.match(line)]


def _multiply_adds(body: Sequence[str]) -> int:
    return sum(MULTIPLY_ADD.match(line) is not None for line in body)


def _products(body: Sequence[str]) -> tuple[int, int]:
    """Multiply-adds with a single input, as products of matrices have and transforms of tiles do not; and all."""
    return sum(BY_ELEMENT.match(line) is not None for line in body), _multiply_adds(body)


def analyse(body: Sequence[str], core: str, dtype: ElementName = "float32") -> Found:
    """What the analyser says of a loop's `body` on `core`."""
    # Each multiply-add by itself, into one of as many registers as hide the latency.
    full = ARRANGEMENTS[dtype]
    alone = [f"fmla v{number % 30}.{full}, v30.{full}, v31.{full}" for number in range(_multiply_adds(body))]
    core = MODELS_OF_CORES.get((core, dtype), core)
    stack = sum(STACK_VECTOR.match(line) is not None for line in body)
    return Found(len(alone), _cycles(body, core), _cycles(alone, core), stack)


def _cycles(body: Sequence[str], core: str) -> float:
    """Cycles of one of many iterations."""
    command = [_analyser(), "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", f"-iterations={ITERATIONS}"]
    done = subprocess.run(command, input="\n".join(body), capture_output=True, text=True, check=True)
    match = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert match is not None
    return int(match.group(1)) / ITERATIONS


def find_analyser() -> str | None:
    """The path of the newest analyser here, of LLVM 16 or later; None if there is none.

    LLVM 14's takes loops in float16 on a Neoverse N1 for a fifth slower than later ones do.
    """
    names = (*(f"llvm-mca-{version}" for version in range(30, OLDEST_LLVM - 1, -1)), "llvm-mca")
    paths = (path for name in names if (path := shutil.which(name)))
    return next((path for path in paths if _version(path) >= OLDEST_LLVM), None)


def _version(path: str) -> int:
    """The version of LLVM that an analyser is of; 0 if it does not say."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"LLVM version (\d+)", said)
    return int(match.group(1)) if match else 0


def _analyser() -> str:
    found = find_analyser()
    if found is None:
        why = f"there is no llvm-mca of LLVM {OLDEST_LLVM} or later"
        raise SystemExit(f"inner_loops: {why}; install one (Debian: apt install llvm-19)")
    return found


if __name__ == "__main__":
    sys.exit(main())
