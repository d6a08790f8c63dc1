"""Whether the cost model chooses better with what is measured on a device than with the description of its core.

    python -m benchmarks.devices tracker:9190 --key rpi --target arm64:cortex-a72 --models mobilenetv2_100 fasternet_t0

All devices of the key are measured by `sepc.calibrate`, and then each takes one model after the other: compiled with
the figures of the description and with those that were measured, compared with eager, and timed in turn. A ratio of
measured to predicted time that is near 1, and alike for all models, is what choices rest on.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

import sepc
from benchmarks import models
from sepc.target import Target

MODELS = ("mobilenetv1_100", "mobilenetv2_100", "efficientnet_lite0", "fasternet_t0")
TOLERANCE = 1e-4
ROUNDS = 3
# PyTorch exports one model at a time; devices run in parallel.
_one_compiles = threading.Lock()


@dataclass(frozen=True)
class Timed:
    """A model on a device with one description of it: predicted and measured time of the regions with a prediction."""

    predicted_us: float
    measured_us: float

    @property
    def ratio(self) -> float:
        """Measured to predicted time."""
        return self.measured_us / self.predicted_us


@dataclass(frozen=True)
class Row:
    """A model on the device that it came to."""

    model: str
    device: str
    described: Timed
    measured: Timed

    def __str__(self) -> str:
        """A line of the table."""
        columns = [f"{self.model:28}"]
        for one in (self.described, self.measured):
            columns += [f"{one.predicted_us / 1e3:12.2f}", f"{one.measured_us / 1e3:12.2f}", f"{one.ratio:6.2f}"]
        gain = self.described.measured_us / self.measured.measured_us
        return "  ".join([*columns, f"{gain:6.3f}", self.device])


HEAD = "  ".join(
    [
        f"{'model':28}",
        *2 * (f"{'predicted ms':>12}", f"{'measured ms':>12}", f"{'ratio':>6}"),
        f"{'gain':>6}",
        "device",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row per model; 1 if a device's result differs from eager."""
    options = parse(arguments)
    target = Target.parse(options.target)
    remote = sepc.remote(options.address, options.key, timeout_s=options.timeout)
    machine = sepc.calibrate(runner=remote, target=target)
    devices = remote.count()
    remote.close()
    print(f"{devices} device(s), target {target.text}: description, then what was measured")
    print(HEAD, flush=True)
    remotes: queue.SimpleQueue[sepc.Remote] = queue.SimpleQueue()
    for _ in range(devices):
        remotes.put(remote.another())

    def check(name: str) -> Row:
        own = remotes.get()
        try:
            return compare(name, options.size, own, target, target.with_machine(machine), options.threads)
        finally:
            remotes.put(own)

    with ThreadPoolExecutor(devices) as pool:
        for row in pool.map(check, options.models):
            print(row, flush=True)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The cost model's choices on devices behind TVM's RPC.")
    parser.add_argument("address", help="of a device's RPC server, or with a key of a tracker")
    parser.add_argument("--key", default="", help="of the devices behind the tracker")
    parser.add_argument("--target", default="arm64", help="what the devices are")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the image (default: the model's own)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="to wait for a device's answers")
    return parser.parse_args(arguments)


def compare(name: str, size: int | None, remote: sepc.Remote, described: Target, measured: Target, threads: int) -> Row:
    """One model on one device, with two descriptions of that. Raises VerificationError if its results are wrong."""
    with _one_compiles:
        model, inputs = models.load(name, size)
        with torch.inference_mode():
            expected = model(*inputs)
        compiled = [
            sepc.compile(model, target=target, num_threads=threads, runner=remote, example_inputs=inputs)
            for target in (described, measured)
        ]
    for one in compiled:
        error = float((one(*inputs) - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise sepc.VerificationError("A device's result differs from eager", where=name, why=f"by {error:.1e}")
    rounds = [[timed(one, inputs) for one in compiled] for _ in range(ROUNDS)]
    first, second = (min(own, key=lambda one: one.measured_us) for own in zip(*rounds, strict=True))
    return Row(name, remote.board().address, first, second)


def timed(compiled: sepc.CompiledModel, inputs: Sequence[torch.Tensor]) -> Timed:
    """Medians of a few calls, summed over the regions with a prediction."""
    rows = [row for row in compiled.profile(*inputs, repeats=9) if row.predicted_us]
    return Timed(sum(row.predicted_us for row in rows), sum(row.measured_us for row in rows))


if __name__ == "__main__":
    sys.exit(main())
