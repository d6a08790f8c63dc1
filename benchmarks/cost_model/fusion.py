"""Fuse or not: every chain that could be made of neighbouring regions of a model, against its single kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from torch import fx

from benchmarks import models
from benchmarks.cost_model.choice import describe_stages
from benchmarks.cost_model.kernels import Bench, Launch, lower_region
from benchmarks.cost_model.regions import Region, captured, extract_piece, merge_all, own_regions, run_passes
from benchmarks.cost_model.results import Report
from sepc.ir import region
from sepc.passes.fuse import LONGEST
from sepc.passes.sequences import find_sequences
from sepc.target import Target

MODELS: Final = ("mobilenetv2_100", "efficientnet_b0", "convnext_tiny")
SETTINGS: Final = ((224, 1), (224, 16), (1024, 1))  # pixels a side, batch
ROUNDS: Final = 9
MATTERS: Final = 0.10
GOAL: Final = 0.95


@dataclass(frozen=True)
class Outcome:
    """One chain: predicted and measured times of it and of its links as single kernels, in microseconds."""

    model: str
    size: int
    batch: int
    stages: str
    predicted_single_us: float
    predicted_chain_us: float
    single_us: float
    chain_us: float
    agree: bool

    @property
    def speedup(self) -> float:
        """How much faster the chain is than its links."""
        return self.single_us / self.chain_us

    @property
    def matters(self) -> bool:
        """Whether the two differ by more than a tenth of the quicker one."""
        return max(self.speedup, 1 / self.speedup) > 1 + MATTERS

    @property
    def picks_chain(self) -> bool:
        """Whether the model would fuse."""
        return self.predicted_chain_us < self.predicted_single_us

    @property
    def is_right(self) -> bool:
        """Whether the model picks the faster one."""
        return self.picks_chain == (self.speedup > 1)


def chains_of(graph_module: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """All runs of regions, with the permutes between them, that `sepc.passes.fuse` would consider."""
    for sequence in find_sequences(graph_module):
        for begin, end in combinations(range(len(sequence.nodes) + 1), 2):
            if 2 <= end - begin <= LONGEST["time"]:
                yield sequence.piece(begin, end)


def compare(model: str, size: int, batch: int, piece: fx.GraphModule, target: Target, threads: int) -> Outcome:
    """Time the regions of `piece` one after the other, and as one chain; changes `piece`."""
    run_passes(piece, target, threads, "plan-layout", "choose-tiling")
    singles = _singles(piece)
    names = [found.name for found in singles]
    given = list(dict.fromkeys(name for found in singles for name in found.inputs if name not in names))
    buffers = {name: index for index, name in enumerate(given)}
    sizes = [max(_elements(singles, name)) for name in given]
    for found in singles:
        buffers[found.name] = len(sizes)
        sizes.append(found.result_elements)
    chain = _as_chain(piece, target, threads)
    result = len(sizes)
    sizes.append(chain.result_elements)
    launches = [_launch(found, buffers, buffers[found.name], target) for found in singles]
    variants = [launches, [_launch(chain, buffers, result, target)]]
    bench = Bench(variants, sizes, len(given), target, threads)
    bench.run(0)
    bench.run(1)
    single, fused = bench.blocks[buffers[names[-1]]], bench.blocks[result]
    times = bench.times_us((0, 1), ROUNDS)
    barriers_us = target.machine.barrier_us if threads > 1 else 0.0
    return Outcome(
        model,
        size,
        batch,
        describe_stages(chain),
        sum(found.chosen.cost.time_us + barriers_us for found in singles),
        chain.chosen.cost.time_us + barriers_us,
        times[0],
        times[1],
        bool(abs(single - fused).max() <= 1e-4 * abs(single).max()),
    )


def _singles(piece: fx.GraphModule) -> list[Region]:
    """The regions of `piece` but for copies of its result to the strides of eager PyTorch."""
    return [found for found in own_regions(piece) if found.kind != "copy"]


def _elements(regions: Sequence[Region], name: str) -> list[int]:
    return [
        elements
        for found in regions
        for value, elements in zip(found.inputs, found.input_elements, strict=True)
        if value == name
    ]


def _launch(found: Region, buffers: dict[str, int], result: int, target: Target) -> Launch:
    kernel = lower_region(found, found.chosen.tiling, target.vector_lanes)
    return Launch(kernel, tuple(buffers[name] for name in found.inputs), result)


def _as_chain(piece: fx.GraphModule, target: Target, threads: int) -> Region:
    """All regions of `piece` as one, planned."""
    for node in [node for node, _ in region.regions(piece) if region.info(node).kind == "copy"]:
        node.replace_all_uses_with(region.inputs(node)[0])
        piece.graph.erase_node(node)
    merge_all(piece)
    run_passes(piece, target, threads, "plan-layout", "choose-tiling")
    return next(own_regions(piece, ("chain",)))


def outcomes_of(model: str, size: int, batch: int, threads: int, most: int) -> Iterator[Outcome]:
    """The chains of a model, each distinct one once."""
    target = Target.parse("native")
    module, inputs = models.load(model, size, batch)
    graph_module = captured(module, inputs)
    run_passes(graph_module, target, threads, "canonicalize", "plan-layout", without=("fuse", "gather-means"))
    seen: set[object] = set()
    for nodes in chains_of(graph_module):
        piece = extract_piece(graph_module, nodes)
        run_passes(piece, target, threads, "plan-layout", "choose-tiling")
        key = tuple(found.key for found in _singles(piece))
        if key in seen or len(seen) >= most:
            continue
        seen.add(key)
        yield compare(model, size, batch, extract_piece(graph_module, nodes), target, threads)


def run(*, quick: bool = False, threads: int = 1) -> Report:
    """All models and settings, or a few chains of one."""
    outcomes = []
    for model in MODELS[: 1 if quick else None]:
        for size, batch in SETTINGS[: 1 if quick else None]:
            for outcome in outcomes_of(model, size, batch, threads, 12 if quick else 1000):
                outcomes.append(outcome)
                print(_line(outcome), flush=True)
    return report_of(outcomes, threads)


def _line(one: Outcome) -> str:
    predicted = f"predicted {one.predicted_single_us:.0f} → {one.predicted_chain_us:.0f} µs"
    measured = f"measured {one.single_us:.0f} → {one.chain_us:.0f} µs"
    verdict = ("right" if one.is_right else "WRONG") if one.matters else "no matter"
    return f"{one.model} {one.size} batch {one.batch} [{one.stages}]: {predicted}, {measured}, {verdict}"


def report_of(outcomes: Sequence[Outcome], threads: int) -> Report:
    """The table and the share of right decisions."""
    columns = [
        *("model", "size", "batch", "stages", "single µs", "chain µs", "speedup", "predicted single µs"),
        *("predicted chain µs", "picks", "verdict"),
    ]
    report = Report("fusion", f"Chains against single kernels, {threads} thread(s)", columns)
    for one in outcomes:
        verdict = ("right" if one.is_right else "wrong") if one.matters else "no matter"
        report.rows.append(
            [
                *(one.model, one.size, one.batch, one.stages, one.single_us, one.chain_us, one.speedup),
                *(one.predicted_single_us, one.predicted_chain_us, "chain" if one.picks_chain else "single", verdict),
            ]
        )
    matter = [one for one in outcomes if one.matters]
    right = sum(one.is_right for one in matter)
    share = f"{right / len(matter):.1%}" if matter else "none"
    report.summary += [
        f"Fuse or not: {len(outcomes)} chains, {len(matter)} of them more than {MATTERS:.0%} apart; the model picked "
        f"the faster one in {right} of these: {share} (goal {GOAL:.0%})",
        f"Chains whose result differs from the single kernels': {sum(not one.agree for one in outcomes)}",
    ]
    report.settings = {"threads": threads, "rounds": ROUNDS}
    return report
