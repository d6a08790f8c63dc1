"""One model, in a process of its own: compiled in each way, compared with eager, timed in turn with it, looked into.

    python -m benchmarks.coverage.one_model mobilenetv2_100 --rounds 3 --output row.json

The process gives back all memory when it ends, and a crash is that of one model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves

import sepc
from benchmarks import models
from benchmarks.coverage import zoo
from sepc.bench.measure import describe, measure, relative_error
from sepc.bench.peers import Job, Runner, eager

EXPORT: Final = "export"
DYNAMO: Final = "dynamo"
WAYS: Final = (EXPORT, DYNAMO)
TURN_S: Final = 0.15
LEAST_VARIATION: Final = 1e-3
"""Outputs of two images must differ by so much of the largest: ten times the tolerance."""


@dataclass
class Partition:
    """Who computes what in a compiled model: sepc's own stages ("sepc"), TVM ("tvm") or PyTorch ("torch").

    Attributes:
        flops, bytes_moved, regions: by who computes. FLOPs are those of convolutions and products of matrices.
        convolutions: by who computes. fallbacks: how many regions are not of our stages, by the reason.
    """

    flops: dict[str, int] = field(default_factory=dict)
    bytes_moved: dict[str, int] = field(default_factory=dict)
    regions: dict[str, int] = field(default_factory=dict)
    convolutions: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass
class Row:
    """What was found of one model.

    Attributes:
        model: its name. size: of the image, in pixels a side. rounds: how many times each way was timed.
        variation: how much outputs depend on the image: max |f(a) - f(b)| / max |f(a)|.
        ways: what became of each way to compile it, `WAYS`, with errors and times; eager's times under "eager".
        partition: who computes what, where the model was compiled as one graph.
        eager_error: where a way is not right, how far eager itself is from float64: what rounding alone does there.
        failure: why there is nothing of the above.
    """

    model: str
    size: int = 0
    rounds: int = 0
    variation: float = 0.0
    ways: dict[str, dict[str, Any]] = field(default_factory=dict)
    partition: Partition | None = None
    eager_error: float | None = None
    failure: str = ""


def run(name: str, rounds: int, ways: Sequence[str] = WAYS, size: int | None = None) -> Row:
    """Measure the model `name`; without `rounds` it is only compared with eager."""
    torch.set_num_threads(1)
    row = Row(name, size or models.default_size(name), rounds)
    try:
        module, inputs = models.load(name, row.size)
    except Exception as error:
        row.failure = describe(error)
        return row
    row.variation = variation(module, inputs)
    if zoo.needs_graph_breaks(name):
        ways = [way for way in ways if way == DYNAMO]
    compiled: list[sepc.CompiledModel] = []
    builders: Mapping[str, Callable[[Job], Runner]] = {
        "eager": eager,
        EXPORT: lambda job: _exported(job, compiled),
        DYNAMO: _by_dynamo,
    }
    wanted = [*(["eager"] if rounds else []), *ways]
    results = measure(Job(module, inputs, 1), wanted, max(rounds, 1), builders, turn_s=TURN_S if rounds else 0.0)
    row.ways = {way: result.to_json() for way, result in results.items()}
    if compiled:
        row.partition = partition(compiled[0].explain())
    if not zoo.needs_graph_breaks(name) and not all(result.is_right for result in results.values()):
        row.eager_error = eager_error(module, inputs)
    return row


def eager_error(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> float | None:
    """How far results in float32 are from those in float64, relative to the largest; None if not numbers."""
    with torch.inference_mode():
        outputs = _tensors(module(*inputs))
        exact = _tensors(copy.deepcopy(module).double()(*(x.double() for x in inputs)))
    error = relative_error(outputs, exact)
    return error if math.isfinite(error) else None


def variation(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """How much the outputs of two images differ, relative to the largest; 1 where their shapes do, 0 if not numbers."""
    other = models.images(inputs[0].shape[-1], inputs[0].shape[0], torch.Generator().manual_seed(models.SEED + 2))
    with torch.inference_mode():
        first, second = ([leaf for leaf in tree_leaves(module(x)) if leaf.numel()] for x in (*inputs, other))
    if [leaf.shape for leaf in first] != [leaf.shape for leaf in second]:
        return 1.0
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.is_floating_point()]
    least = min((float((a - b).abs().max() / a.abs().max()) for a, b in pairs), default=0.0)
    return least if math.isfinite(least) else 0.0


def _exported(job: Job, compiled: list[sepc.CompiledModel]) -> Runner:
    """`sepc.compile`; appends what it makes to `compiled`."""
    os.environ["SEPC_CACHE"] = "0"  # The time to build is that of compiling.
    model = sepc.compile(job.model, example_inputs=job.inputs, num_threads=job.threads)
    compiled.append(model)
    return Runner(lambda: model(*job.inputs), _tensors, {"compile_times_s": dict(model.compile_times)})


def _by_dynamo(job: Job) -> Runner:
    """`torch.compile` with sepc as its backend."""
    import torch._dynamo

    torch._dynamo.reset()
    os.environ["SEPC_CACHE"] = "0"
    model = torch.compile(job.model, backend="sepc")
    with torch.inference_mode():  # It compiles in the first call.
        model(*job.inputs)
    return Runner(lambda: model(*job.inputs), _tensors)


def _tensors(result: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def partition(explanation: sepc.Explanation) -> Partition:
    """Who computes what of a compiled model."""
    totals = {who: total for who, total in explanation.by_kernel.items() if total.regions}
    convolutions, fallbacks = Counter[str](), Counter[str]()
    for one in explanation.regions:
        convolutions[one.kernel] += sum(map(is_convolution, one.ops))
        if one.reason:
            fallbacks[one.reason] += 1
    return Partition(
        {who: total.flops for who, total in totals.items()},
        {who: total.bytes_moved for who, total in totals.items()},
        {who: total.regions for who, total in totals.items()},
        dict(convolutions),
        dict(fallbacks),
    )


def is_convolution(op: str) -> bool:
    """Whether an ATen operator is a convolution of any number of dimensions, transposed or not."""
    return op.startswith(("conv", "_convolution"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the row of one model as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage.one_model")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--size", type=int, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    row = run(options.model, options.rounds, options.ways, options.size)
    options.output.write_text(json.dumps(asdict(row)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
