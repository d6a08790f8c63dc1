"""The measurement: all runners in turn, round after round, in one process, each output checked against eager.

Turns make the comparison fair where clock and neighbours change: whatever slows one round slows all runners.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from sepc.bench.peers import BUILDERS, NATIVE, UNRESTRICTED, Job, Runner

TOLERANCE = 1e-4
_TURN_S = 0.15
_MINIMUM_CALLS, _MAXIMUM_CALLS = 3, 100
_WARM_UP_CALLS = 2
# OpenMP and TBB workers go on spinning for a few milliseconds after a parallel region, on cores that the next needs.
_PAUSE_S = 0.02
REFERENCE = "eager"


@dataclass
class PeerResult:
    """One runner on one model.

    Attributes:
        rounds_ms: the median latency of each round.
        fastest_ms: the fastest single call.
        error: the largest max |y - reference| / max |reference| seen, over all outputs and rounds.
        build_s: time to export and compile.
        failure: why there are no figures; empty if there are.
        details: what the runner tells about its build.
        isa: what its kernels use, see `Runner.isa`.
    """

    rounds_ms: list[float] = field(default_factory=list)
    fastest_ms: float = math.inf
    error: float = 0.0
    build_s: float = 0.0
    failure: str = ""
    details: dict[str, object] = field(default_factory=dict)
    isa: str = NATIVE

    @property
    def median_ms(self) -> float:
        """Median over rounds; not a number if the runner failed."""
        return statistics.median(self.rounds_ms) if self.rounds_ms and not self.failure else math.nan

    @property
    def is_right(self) -> bool:
        """Whether every output was within the tolerance; false also if one was not a number."""
        return not self.failure and self.error <= TOLERANCE

    @property
    def competes(self) -> bool:
        """Whether it may be the best: it is right, and has not escaped the limit on instruction sets."""
        return self.is_right and self.isa != UNRESTRICTED

    def to_json(self) -> dict[str, object]:
        """All fields, and those derived from them; null where there is no figure."""
        values: dict[str, object] = {"median_ms": self.median_ms, "is_right": self.is_right, **asdict(self)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass
class ModelResult:
    """All runners on one model, for one number of threads and limit on instruction sets.

    `inputs` are as ``1x3x224x224``, with types that are not float32, separated by commas; empty where not known.
    """

    model: str
    inputs: str
    threads: int
    peers: dict[str, PeerResult]
    isa: str = NATIVE

    def to_json(self) -> dict[str, object]:
        """The figures as JSON values."""
        return {**asdict(self), "peers": {name: peer.to_json() for name, peer in self.peers.items()}}


def measure(
    job: Job,
    peers: Sequence[str],
    rounds: int,
    builders: Mapping[str, Callable[[Job], Runner]] = BUILDERS,
    turn_s: float = _TURN_S,
) -> dict[str, PeerResult]:
    """Build the runners named `peers` and time them in turn.

    Args:
        job: the model, its inputs, the number of threads.
        peers: keys of `builders`.
        rounds: how many turns each runner gets.
        builders: how to make each runner.
        turn_s: about how long the timed calls of one turn take together.
    """
    with torch.inference_mode():
        reference = [tensor.clone() for tensor in _run_reference(job)]
    results = {peer: PeerResult() for peer in peers}
    runners = {}
    for peer in peers:
        runner = _build(job, builders[peer], results[peer])
        if runner is not None:
            runners[peer] = runner
    for _ in range(rounds):
        for peer, runner in runners.items():
            if not results[peer].failure:
                time.sleep(_PAUSE_S)
                _take_turn(runner, results[peer], reference, turn_s)
    return results


def inputs_text(inputs: Sequence[torch.Tensor]) -> str:
    """Shapes, and types that are not float32, as `sepc-opt` takes them."""
    texts = []
    for one in inputs:
        dtype = "" if one.dtype == torch.float32 else f":{str(one.dtype).removeprefix('torch.')}"
        texts.append("x".join(map(str, one.shape)) + dtype)
    return ", ".join(texts)


def _run_reference(job: Job) -> list[torch.Tensor]:
    runner = BUILDERS[REFERENCE](job)
    return runner.tensors(runner.run())


def _build(job: Job, builder: Callable[[Job], Runner], result: PeerResult) -> Runner | None:
    """The runner, or nothing and the reason in `result`: one runtime's gap must not end the whole comparison."""
    start_s = time.perf_counter()
    try:
        runner = builder(job)
    except Exception as error:
        result.failure = describe(error)
        return None
    result.build_s = time.perf_counter() - start_s
    result.details.update(runner.details)
    result.isa = runner.isa
    return runner


def _take_turn(runner: Runner, result: PeerResult, reference: list[torch.Tensor], turn_s: float) -> None:
    """One turn: warm up, time as many calls as fit `turn_s`, check the last output."""
    try:
        with torch.inference_mode():
            latencies_ms, output = _time_calls(runner, turn_s)
            result.error = _larger(result.error, relative_error(runner.tensors(output), reference))
    except Exception as error:
        result.failure = describe(error)
        return
    result.rounds_ms.append(statistics.median(latencies_ms))
    result.fastest_ms = min(result.fastest_ms, *latencies_ms)


def _time_calls(runner: Runner, turn_s: float) -> tuple[list[float], object]:
    """Latency in milliseconds of each timed call, and the last result."""
    for _ in range(_WARM_UP_CALLS):
        start_ns = time.perf_counter_ns()
        output = runner.run()
        warm_ns = time.perf_counter_ns() - start_ns
    calls = min(max(round(turn_s * 1e9 / warm_ns), _MINIMUM_CALLS), _MAXIMUM_CALLS)
    latencies_ms = []
    gc.disable()
    try:
        for _ in range(calls):
            start_ns = time.perf_counter_ns()
            output = runner.run()
            latencies_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
    finally:
        gc.enable()
    return latencies_ms, output


def relative_error(outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """The largest max |y - reference| / max |reference| over all outputs; not a number if any output holds one."""
    if [tuple(y.shape) for y in outputs] != [tuple(y.shape) for y in reference]:
        raise ValueError(
            f"outputs of shapes {[tuple(y.shape) for y in outputs]}, expected {[tuple(y.shape) for y in reference]}"
        )
    worst = 0.0
    for output, expected in zip(outputs, reference, strict=True):
        difference = float((output.double() - expected.double()).abs().max())
        worst = _larger(worst, difference / max(float(expected.abs().max()), 1e-30))
    return worst


def _larger(first: float, second: float) -> float:
    """The maximum; unlike the built-in, not a number if either is not."""
    return math.nan if math.isnan(first) or math.isnan(second) else max(first, second)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
