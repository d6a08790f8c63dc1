"""Choice: the tiling that the cost model chooses, against others, timed in turn in one run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import models
from benchmarks.cost_model.kernels import Bench, Launch, lower_region
from benchmarks.cost_model.regions import Region, captured, own_regions, run_passes
from benchmarks.cost_model.results import Report, median_and_p90
from sepc.cost_model.tiling import Tiling
from sepc.ir.convolution import Convolution
from sepc.ir.stage import Map, Normalization, Pooling, Stage
from sepc.target import Target

MODELS: Final = (
    "mobilenetv1_100",
    "mobilenetv2_100",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "convnext_tiny",
    "resnet50",
)
KINDS: Final = ("convolution", "linear", "chain")
FIRST_ROUNDS, FINAL_ROUNDS = 5, 21
FINALISTS: Final = 6
FULL_SEARCH: Final = 50
GOAL: Final = (0.05, 0.15)


@dataclass(frozen=True)
class Outcome:
    """One region: predicted and measured times of the chosen tiling, and the best of all."""

    model: str
    region: str
    kind: str
    stages: str
    tilings: int
    predicted_us: float
    chosen_us: float
    best_us: float
    chosen: Tiling
    best: Tiling
    wrong: int

    @property
    def regret(self) -> float:
        """By how much the chosen tiling is slower than the best."""
        return self.chosen_us / self.best_us - 1


def regions_of(model: str, target: Target, threads: int, count: int, seen: set[object]) -> list[Region]:
    """Up to `count` regions of `model` that are not in `seen`, to which they are added: evenly over the predicted time.

    Half of them are the most expensive ones.
    """
    module, inputs = models.load(model)
    graph_module = captured(module, inputs)
    # Kernels are timed by their one result.
    run_passes(graph_module, target, threads, "canonicalize", "choose-tiling", without=("gather-means",))
    unique: dict[object, Region] = {}
    for found in own_regions(graph_module, KINDS):
        if found.key not in seen:
            unique.setdefault(found.key, found)
    ordered = sorted(unique.values(), key=lambda found: -found.chosen.cost.time_us)
    half = ordered[: count // 2]
    rest = ordered[count // 2 :]
    step = max(1, len(rest) // max(1, count - len(half)))
    picked = (half + rest[::step])[:count]
    seen.update(found.key for found in picked)
    return picked


def compare(model: str, found: Region, target: Target, threads: int, alternatives: int) -> Outcome:
    """Time the chosen tiling of a region against `alternatives` others; the quickest few once more, for longer.

    The figures are of the second timing only: the best of many noisy ones would look better than it is.
    """
    machine = target.machine
    tilings = [found.chosen.tiling, *found.alternatives(machine, threads, alternatives, random.Random(0))]
    inputs = len(found.input_elements)
    launches = [
        [Launch(lower_region(found, tiling, target.vector_lanes), tuple(range(inputs)), inputs)] for tiling in tilings
    ]
    bench = Bench(launches, [*found.input_elements, found.result_elements], inputs, target, threads)
    wrong = bench.disagreeing(range(len(tilings)), inputs)
    first = bench.times_us(range(len(tilings)), FIRST_ROUNDS)
    finalists = sorted(first, key=lambda index: first[index])[:FINALISTS]
    final = bench.times_us(sorted({0, *finalists}), FINAL_ROUNDS)
    best = min(final, key=lambda index: final[index])
    return Outcome(
        model,
        found.name,
        found.kind,
        describe_stages(found),
        len(tilings),
        found.chosen.cost.time_us,
        final[0],
        final[best],
        tilings[0],
        tilings[best],
        len(wrong),
    )


def describe_stages(found: Region) -> str:
    """The shapes of a region's stages, in short."""
    return ", ".join(describe_stage(problem.link) for problem in found.problems)


def describe_stage(stage: Stage) -> str:
    """The shape of a stage, in short."""
    if isinstance(stage, Map):
        return f"map {'×'.join(map(str, stage.extents))}"
    names = {Normalization: "norm", Pooling: "pool"}
    name = names.get(type(stage), "conv")
    if isinstance(stage, Convolution) and stage.groups > 1:
        name = "dw" if stage.group_in == 1 else "grouped"
    elif name == "conv" and stage.kernel == (1, 1):
        name = "pw"
    window = "" if stage.kernel == (1, 1) else str(stage.kernel[0])
    stride = f"/{stage.stride[0]}" if stage.stride[0] > 1 else ""
    return f"{name}{window}{stride} {stage.in_channels}→{stage.out_channels} @{stage.out_height}×{stage.out_width}"


def run(*, quick: bool = False, threads: int = 1) -> Report:
    """Compare tilings of regions of six models."""
    target = Target.parse("native")
    seen: set[object] = set()
    outcomes = []
    for model in MODELS[:: 3 if quick else 1]:
        for found in regions_of(model, target, threads, 4 if quick else 8, seen):
            outcomes.append(compare(model, found, target, threads, 24 if quick else 56))
            print(_line(outcomes[-1]), flush=True)
    return report_of(outcomes, threads)


def _line(outcome: Outcome) -> str:
    times = f"predicted {outcome.predicted_us:.1f}, chosen {outcome.chosen_us:.1f}, best {outcome.best_us:.1f} µs"
    return f"{outcome.model} {outcome.stages}: {times}, regret {outcome.regret:.1%}"


def report_of(outcomes: Sequence[Outcome], threads: int) -> Report:
    """The table and the figures of `outcomes`."""
    columns = [
        *("model", "region", "kind", "stages", "tilings", "predicted µs", "chosen µs", "best µs"),
        *("regret %", "wrong", "chosen", "best"),
    ]
    report = Report("choice", f"Chosen tiling against others, {threads} thread(s)", columns)
    for one in outcomes:
        report.rows.append(
            [
                *(one.model, one.region, one.kind, one.stages, one.tilings),
                *(one.predicted_us, one.chosen_us, one.best_us, 100 * one.regret, one.wrong),
                *(str(one.chosen), str(one.best)),
            ]
        )
    median, high = median_and_p90([one.regret for one in outcomes])
    error, error_high = median_and_p90([abs(one.predicted_us / one.chosen_us - 1) for one in outcomes])
    many = [one for one in outcomes if one.tilings >= FULL_SEARCH]
    many_median, many_high = median_and_p90([one.regret for one in many or outcomes])
    report.summary += [
        f"Choice: {len(outcomes)} regions of {len({one.model for one in outcomes})} models: regret median {median:.1%} "
        f"(goal {GOAL[0]:.0%}), 90th percentile {high:.1%} (goal {GOAL[1]:.0%})",
        f"Of these, the {len(many)} that have {FULL_SEARCH} tilings or more: median {many_median:.1%}, 90th percentile "
        f"{many_high:.1%}",
        f"Predicted time of the chosen tiling: relative error median {error:.1%}, 90th percentile {error_high:.1%}",
        f"Tilings whose result differs from the chosen one's: {sum(one.wrong for one in outcomes)}",
    ]
    report.settings = {"threads": threads, "first_rounds": FIRST_ROUNDS, "final_rounds": FINAL_ROUNDS}
    return report
