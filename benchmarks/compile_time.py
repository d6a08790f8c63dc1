"""How long compiling takes: cold, from the cache, and not at all, from a saved artefact.

    python -m benchmarks.compile_time mobilenetv2_100 --json benchmarks/results/compile_time.json

Every figure is the median of several processes, each of which does one thing for the first time. What a user pays
anyway is left out: importing torch, timm, sepc and TVM, and making the model. Of a compilation from the cache, what
torch.export alone takes in a process of its own is told apart: sepc has to export a model to know whether it is in the
cache. Exits with 1 if a goal is missed, a result is wrong, or TVM was loaded where it must not be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from sepc.bench.measure import relative_error

TOLERANCE: Final = 1e-4
COLD_GOAL_S: Final = 10.0
WARM_GOAL_S: Final = 0.5


@dataclass(frozen=True)
class Figures:
    """Medians over processes, in seconds.

    Attributes:
        model: its name. threads: threads per call. repeats: processes per figure.
        cold_s: compiling with an empty cache, without the imports. stages_s: the stages of that.
        export_s: torch.export alone.
        warm_s: compiling with the kernels in the cache, imports of sepc's own modules included.
        warm_extra_s: the median of `warm_s` minus that of `export_s`.
        load_s: reading a saved artefact, `import sepc` included. first_run_s: the first call of what was read.
        error: the largest max |y - eager| / max |eager| of all processes.
        imported_tvm: the ways "warm" and "load" in which TVM was loaded; ought to be empty.
    """

    model: str
    threads: int
    repeats: int
    cold_s: float
    stages_s: dict[str, float]
    export_s: float
    warm_s: float
    warm_extra_s: float
    load_s: float
    first_run_s: float
    error: float
    imported_tvm: list[str]

    @property
    def is_good(self) -> bool:
        """Whether every goal is met."""
        quick = self.cold_s <= COLD_GOAL_S and self.warm_extra_s <= WARM_GOAL_S
        return quick and self.error <= TOLERANCE and not self.imported_tvm

    def __str__(self) -> str:
        """A line per figure."""
        stages = ", ".join(f"{name} {time_s:.2f}" for name, time_s in self.stages_s.items())
        return "\n".join(
            [
                f"{self.model}, {self.threads} threads, medians of {self.repeats} processes, in seconds",
                f"  compiling, cold    {self.cold_s:6.2f}  (goal {COLD_GOAL_S:g}; {stages})",
                f"  torch.export alone {self.export_s:6.2f}",
                f"  compiling, warm    {self.warm_s:6.2f}  (adds {self.warm_extra_s:.2f}, goal {WARM_GOAL_S:g})",
                f"  loading a file     {self.load_s:6.3f}",
                f"  its first run      {self.first_run_s:6.3f}",
                f"  largest error {self.error:.1e}; TVM loaded without need: {', '.join(self.imported_tvm) or 'never'}",
            ]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 if every goal is met."""
    options = parse(arguments)
    if options.way:
        print(json.dumps(WAYS[options.way](options)))
        return 0
    results = [measure(model, options.threads, options.repeats) for model in options.models]
    print(*results, sep="\n")
    if options.json:
        content = {"command": " ".join(["python -m benchmarks.compile_time", *(arguments or sys.argv[1:])])}
        text = json.dumps({**content, "results": [asdict(one) for one in results]}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(one.is_good for one in results) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time to compile a model: cold, from the cache, and from a file.")
    parser.add_argument("models", nargs="+", help="models of benchmarks.models, such as mobilenetv2_100")
    parser.add_argument("--threads", type=int, default=2, help="threads per call (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="processes per figure (default: 3)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # what one of the processes is to do
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(model: str, threads: int, repeats: int) -> Figures:
    """Start the processes, way after way, round after round; the first of a round fills the cache for the next."""
    rounds: list[dict[str, dict[str, object]]] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="sepc-bench-") as name:
            rounds.append({way: _run(way, model, threads, Path(name)) for way in WAYS})
    stages = [_mapping(one["cold"]["stages_s"]) for one in rounds]
    median = {way: statistics.median(_number(one[way]["time_s"]) for one in rounds) for way in WAYS}
    without_tvm = ("warm", "load")
    return Figures(
        model=model,
        threads=threads,
        repeats=repeats,
        cold_s=median["cold"],
        stages_s={name: statistics.median(_number(one[name]) for one in stages) for name in stages[0]},
        export_s=median["export"],
        warm_s=median["warm"],
        warm_extra_s=median["warm"] - median["export"],
        load_s=median["load"],
        first_run_s=statistics.median(_number(one["load"]["first_run_s"]) for one in rounds),
        error=max(_number(result.get("error", 0.0)) for one in rounds for result in one.values()),
        imported_tvm=sorted({way for one in rounds for way in without_tvm if one[way]["imported_tvm"]}),
    )


def _run(way: str, model: str, threads: int, directory: Path) -> dict[str, object]:
    """What a process of its own tells of one way."""
    command = [sys.executable, "-m", "benchmarks.compile_time", model, "--threads", str(threads), "--way", way]
    environment = {**os.environ, "SEPC_CACHE_DIR": str(directory / "cache"), "SEPC_CACHE": "1"}
    done = subprocess.run(
        [*command, "--file", str(directory / "model.sepc")], env=environment, check=True, stdout=subprocess.PIPE
    )
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def _cold(options: argparse.Namespace) -> dict[str, object]:
    """Compile with an empty cache, and save."""
    import sepc
    from benchmarks import models

    model, inputs = models.load(options.models[0])
    start_s = time.perf_counter()
    fast = sepc.compile(model, example_inputs=inputs, num_threads=options.threads)
    elapsed_s = time.perf_counter() - start_s
    fast.save(options.file)
    stages_s = dict(fast.compile_times)
    elapsed_s -= stages_s.pop("imports")
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*inputs))
    _write_tensors(options.file.with_suffix(".inputs.npz"), inputs)
    _write_tensors(options.file.with_suffix(".results.npz"), expected)
    error = relative_error(torch.utils._pytree.tree_leaves(fast(*inputs)), expected)
    return {"time_s": elapsed_s, "stages_s": stages_s, "error": error}


def _export(options: argparse.Namespace) -> dict[str, object]:
    """torch.export alone."""
    from benchmarks import models

    model, inputs = models.load(options.models[0])
    start_s = time.perf_counter()
    with torch.no_grad():
        torch.export.export(model, inputs)
    return {"time_s": time.perf_counter() - start_s}


def _warm(options: argparse.Namespace) -> dict[str, object]:
    """Compile with the kernels in the cache."""
    from benchmarks import models

    model, inputs = models.load(options.models[0])
    start_s = time.perf_counter()
    import sepc

    fast = sepc.compile(model, example_inputs=inputs, num_threads=options.threads)
    elapsed_s = time.perf_counter() - start_s
    if "passes" in fast.compile_times:
        raise RuntimeError("the kernels did not come from the cache")
    torch.set_num_threads(options.threads)
    return {"time_s": elapsed_s, "error": _error(fast, options.file), "imported_tvm": _has_tvm()}


def _load(options: argparse.Namespace) -> dict[str, object]:
    """Load the saved artefact and run it."""
    inputs = _read_tensors(options.file.with_suffix(".inputs.npz"))
    start_s = time.perf_counter()
    import sepc

    fast = sepc.load(options.file)
    loaded_s = time.perf_counter()
    fast(*inputs)
    done_s = time.perf_counter()
    figures = {"time_s": loaded_s - start_s, "first_run_s": done_s - loaded_s}
    return {**figures, "error": _error(fast, options.file), "imported_tvm": _has_tvm()}


WAYS: Mapping[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "cold": _cold,
    "export": _export,
    "warm": _warm,
    "load": _load,
}


def _error(fast: Callable[..., Any], file: Path) -> float:
    """The error of a model on the inputs that the cold process has left beside `file`, with eager's results."""
    expected = _read_tensors(file.with_suffix(".results.npz"))
    results = fast(*_read_tensors(file.with_suffix(".inputs.npz")))
    return relative_error(torch.utils._pytree.tree_leaves(results), expected)


def _write_tensors(path: Path, tensors: Sequence[torch.Tensor]) -> None:
    np.savez(path, *[tensor.numpy() for tensor in tensors])


def _read_tensors(path: Path) -> list[torch.Tensor]:
    with np.load(path) as arrays:
        return [torch.from_numpy(array) for array in arrays.values()]


def _has_tvm() -> bool:
    return any(name.partition(".")[0] in ("tvm", "tvm_ffi") for name in sys.modules)


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value


if __name__ == "__main__":
    sys.exit(main())
