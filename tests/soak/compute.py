"""Trials of what is computed: random networks and tilings, the models of the benchmarks, exported C, unusual inputs."""

from __future__ import annotations

import math
import os
import random
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import sepc
from sepc.c_compiler import c_compiler
from tests.helpers import TOLERANCE, with_statistics
from tests.soak.guards import differing_sides
from tests.soak.outcome import Outcome
from tests.test_random_networks import Parallel, networks
from tests.tilings import any_chain, any_tiling

NETWORKS_PER_MODEL = 3
_BEFORE_THE_LAST = 4  # Hypothesis begins with the simplest.


def drawn(strategy: st.SearchStrategy[Any], number: int) -> Any:
    """The value of `strategy` for seed `number`."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=_BEFORE_THE_LAST + 1,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def take(value: Any) -> None:
        found.append(value)

    take()
    return found[-1]


def random_model(number: int) -> tuple[nn.Module, list[torch.Tensor]]:
    """Several random networks as one model, and its inputs."""
    parts = drawn(st.lists(networks(), min_size=NETWORKS_PER_MODEL, max_size=NETWORKS_PER_MODEL), number)
    torch.manual_seed(number)
    return with_statistics(Parallel(parts)), [part.example() for part in parts]


def compare(outcome: Outcome, what: str, found: Any, expected: Any) -> None:
    """Note results that are not the `expected` ones."""
    for result, reference in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        error = (result - reference).abs().max() if reference.numel() else torch.zeros(())
        right = result.shape == reference.shape and bool(error <= TOLERANCE * reference.abs().max())
        outcome.check(right, f"{what}: off by {float(error):.2g}")


def check_guards(outcome: Outcome, what: str, compiled: sepc.CompiledModel, inputs: Sequence[torch.Tensor]) -> None:
    """Run the kernels between guard pages, and note results that differ."""
    sides, kernels = differing_sides(compiled, inputs)
    outcome.counts["runs of kernels between guard pages"] += kernels
    outcome.check(not sides, f"{what}: other results with guard pages at the {' and '.join(sides)}")


def random_models(number: int, _: Path) -> Outcome:
    """Random networks against eager, also between guard pages."""
    outcome, (model, inputs) = Outcome(), random_model(number)
    compiled = sepc.compile(model, num_threads=2, optimize="memory" if number % 4 == 0 else "time")
    with torch.no_grad():
        compare(outcome, f"random model {number}", compiled(inputs), model(inputs))
    check_guards(outcome, f"random model {number}", compiled, inputs)
    outcome.counts["random models"] += NETWORKS_PER_MODEL
    return outcome


def random_tilings(number: int, _: Path) -> Outcome:
    """Random networks in random tilings, of stages and of the longest chains, also between guard pages."""
    outcome, (model, inputs) = Outcome(), random_model(number)
    with ExitStack() as stack:
        stack.enter_context(any_tiling(number))
        if number % 2:
            stack.enter_context(any_chain(number))
        compiled = sepc.compile(model, num_threads=1 + number % 2, example_inputs=(inputs,))
    with torch.no_grad():
        compare(outcome, f"random tilings {number}", compiled(inputs), model(inputs))
    check_guards(outcome, f"random tilings {number}", compiled, inputs)
    tilings = {one.tiling for one in compiled.regions if one.kernel == "sepc"}
    outcome.counts["random tilings"] += len(tilings)
    return outcome


def whole_models(number: int, _: Path) -> Outcome:
    """One of the models of the benchmarks, every kernel of it between guard pages."""
    from benchmarks.models import TESTED, load

    outcome, name = Outcome(), TESTED[number % len(TESTED)]
    model, (image,) = load(name)
    compiled = sepc.compile(model, num_threads=1)
    with torch.no_grad():
        compare(outcome, name, compiled(image), model(image))
    check_guards(outcome, name, compiled, [image])
    outcome.counts["whole models between guard pages"] += 1
    return outcome


HARNESS = """
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include "net.h"

/* So many bytes, at a multiple of `alignment`, with a page that nobody may touch behind them, and one before them. */
static unsigned char* guarded(size_t bytes, size_t alignment) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
  unsigned char* base = mmap(NULL, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(base + page, inside, PROT_READ | PROT_WRITE);
  return base + page + (inside - bytes) / alignment * alignment;
}

int main(int count, char** names) {
  static const size_t in[] = {SIZES_IN}, out[] = {SIZES_OUT};
  const void* inputs[sizeof in / sizeof *in];
  void* outputs[sizeof out / sizeof *out];
  unsigned char* arena = guarded(NET_ARENA_BYTES, NET_ALIGNMENT);
  unsigned char* weights = guarded(SIZE_WEIGHTS, NET_ALIGNMENT);
  size_t i, file = 1;
  FILE* f;
  for (i = 0; i < SIZE_WEIGHTS; ++i) weights[i] = net_weights[i];
  for (i = 0; i < sizeof in / sizeof *in; ++i) {
    unsigned char* data = guarded(in[i], 4);
    f = fopen(names[file++], "rb");
    if (!f || fread(data, 1, in[i], f) != in[i]) return 2;
    fclose(f);
    inputs[i] = data;
  }
  for (i = 0; i < sizeof out / sizeof *out; ++i) outputs[i] = guarded(out[i], 4);
  if (net_run(arena, weights, inputs, outputs)) return 3;
  for (i = 0; i < sizeof out / sizeof *out; ++i) {
    f = fopen(names[file++], "wb");
    if (!f || fwrite(outputs[i], 1, out[i], f) != out[i]) return 4;
    fclose(f);
  }
  return file != (size_t)count;
}
"""


def exported_c(number: int, directory: Path) -> Outcome:
    """Random networks as C with sanitizers, arena, weights and tensors between guard pages."""
    outcome, (model, inputs) = Outcome(), random_model(number)
    compiled = sepc.compile(model, num_threads=1 + 2 * (number % 2), example_inputs=(inputs,))
    compiled.export(directory, name="net")
    program = compiled._last().executable.program
    order = compiled._last().description.order
    sizes = [[one.elements * one.dtype.itemsize for one in them] for them in (program.inputs, program.storages)]
    text = HARNESS.replace("SIZE_WEIGHTS", str(max(1, program.constants_bytes)))
    for name, values in zip(("SIZES_IN", "SIZES_OUT"), sizes, strict=True):
        text = text.replace(name, ", ".join(map(str, values)))
    (directory / "main.c").write_text(text)
    sources = sorted(one.name for one in directory.iterdir() if one.suffix in (".c", ".S", ".o"))
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread", "-I."]
    subprocess.run([c_compiler(), *flags, "-o", "net", *sources, "-lm"], cwd=directory, check=True)
    files = [directory / f"file{index}" for index in range(len(sizes[0]) + len(sizes[1]))]
    for file, index in zip(files, order, strict=False):
        value = inputs[index]
        dense = value if value.is_contiguous() else value.movedim(1, -1)
        dense.contiguous().numpy().tofile(file)
    done = subprocess.run([directory / "net", *files], capture_output=True, text=True, check=False)
    outcome.counts["exported programs under sanitizers"] += 1
    outcome.check(done.returncode == 0, f"exported C {number}: {done.returncode}, {done.stderr.strip()[:300]}")
    if done.returncode == 0:
        expected = compiled._last().executable.run([inputs[index] for index in order], 1)
        results = [one for one in program.results if one.block >= 2 + len(order)]
        for reference, place in zip(expected, program.results, strict=True):
            if place in results:
                flat = torch.from_numpy(np.fromfile(files[place.block - 2], np.float32))
                found = flat.as_strided(place.shape, place.strides, place.offset)
                outcome.check(torch.equal(found, reference), f"exported C {number} differs")
    return outcome


def _offset(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def _overlapping(x: torch.Tensor) -> torch.Tensor:
    rows, columns = x.shape[-2:]
    return x.flatten().as_strided(x.shape, (columns * rows // 2, columns, columns - 1, 1))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "at an odd address": _offset,
    "every other one": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "zero strides": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "overlapping": _overlapping,
    "flipped": lambda x: x.flip(2),
    "gradients": lambda x: x.clone().requires_grad_(),
    "negated later": lambda x: torch.complex(x, x).conj().imag,
}
VALUES: dict[str, Callable[[torch.Tensor, random.Random], torch.Tensor]] = {
    "usual": lambda x, _: x,
    "NaN": lambda x, generator: _with(x, generator, math.nan),
    "infinity": lambda x, generator: _with(x, generator, math.inf),
    "denormal": lambda x, _: x * 1e-39,
    "large": lambda x, _: x * 1e18,
}


def _with(x: torch.Tensor, generator: random.Random, value: float) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[generator.randrange(x.numel())] = value
    return x


def _input_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 20, 3, padding=1, stride=2), nn.ReLU6(), nn.Conv2d(20, 20, 3, padding=1, groups=20)]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Conv2d(20, 7, 1), nn.LeakyReLU()).eval()


def unusual_inputs(number: int, _: Path) -> Outcome:
    """Views of every kind, and values of every kind, for one compiled model."""
    outcome, model, generator = Outcome(), _input_model(), random.Random(number)
    compiled = sepc.compile(model, num_threads=2)
    torch.manual_seed(number)
    for name, view in VIEWS.items():
        for kind, change in VALUES.items():
            batch = generator.choice([1, 2, 3])
            x = view(change(torch.randn(batch, 6, 10, 10), generator))
            with torch.inference_mode(generator.random() < 0.2):
                given_x = x.clone() if torch.is_inference_mode_enabled() and not x.requires_grad else x
                found = compiled(given_x)
            expected = model(x.detach()).detach()
            # What is tiny next to a float's range is allowed to be rounded to 0; by how much is told by the biases.
            close = torch.allclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
            finite = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.ones(())
            scaled = torch.allclose(found / finite, expected / finite, rtol=1e-4, atol=1e-4, equal_nan=True)
            outcome.check(close or scaled, f"an input that is {name}, {kind}: {number}")
            outcome.counts["unusual inputs"] += 1
    return outcome


def use_no_cache() -> None:
    """Have trials compile what they are about."""
    os.environ["SEPC_CACHE"] = "0"
