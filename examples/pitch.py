"""Estimate the pitch of synthesised tones with FCPE and its real weights, by PyTorch and by sepc side by side.

    python examples/pitch.py [--threads N] [--rounds N]

FCPE (`torchfcpe` from PyPI, whose wheel carries its weights) is a network over time: pointwise convolutions and
depthwise ones of 31 taps, layer normalisations, gates. Prints what both say of each tone, the largest difference in
cents (hundredths of a semitone), and both latencies. The exit status is 1 if they differ by more than one cent.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

import sepc

SAMPLE_RATE_HZ = 16000
SECONDS = 2.0
HARMONICS = 5
TONES_HZ = (82.4, 110.0, 220.0, 261.6, 440.0, 880.0)
TOLERANCE_CENTS = 1.0

Estimate = Callable[[torch.Tensor], torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if sepc agrees with PyTorch on every tone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of both (default 1)")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each, in turn, for the latencies")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    estimator = load_estimator()
    fast = sepc.compile(estimator.model)
    worst = 0.0
    for tone_hz in TONES_HZ:
        spectrum = mel_spectrum(estimator, tone(tone_hz))
        pitches = [pitch_hz(estimator, run, spectrum) for run in (estimator.model, fast)]
        difference = largest_difference_cents(*pitches)
        worst = max(worst, difference)
        medians = [float(one.median()) for one in pitches]
        print(f"{tone_hz:6.1f} Hz: PyTorch {medians[0]:7.2f}, sepc {medians[1]:7.2f}, off by {difference:.4f} cents")
    eager_ms, fast_ms = interleaved_latency_ms(estimator.model, fast, spectrum, options.rounds)
    print(
        f"{SECONDS} s of sound: PyTorch {eager_ms:.1f} ms, sepc {fast_ms:.1f} ms,"
        f" {eager_ms / fast_ms:.2f} times as fast"
    )
    return int(worst > TOLERANCE_CENTS)


def load_estimator() -> Any:
    """FCPE with its weights: a module whose part `model` takes mel spectra [N, T, 128]."""
    try:
        importlib.import_module("torchaudio.transforms")
    except (ImportError, RuntimeError, OSError):
        # Only needed to resample, which we do not: and the one from PyPI does not load with every build of torch.
        audio, transforms = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.transforms")
        vars(transforms)["Resample"] = None
        sys.modules |= {"torchaudio": audio, "torchaudio.transforms": transforms}
    return importlib.import_module("torchfcpe").spawn_bundled_infer_model("cpu")


def tone(frequency_hz: float) -> torch.Tensor:
    """Samples [1, S, 1] of a tone with a few harmonics."""
    time_s = torch.arange(int(SECONDS * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    waves = [torch.sin(2 * math.pi * frequency_hz * order * time_s) / order for order in range(1, HARMONICS + 1)]
    return 0.1 * torch.stack(waves).sum(0)[None, :, None]


def mel_spectrum(estimator: Any, samples: torch.Tensor) -> torch.Tensor:
    """The spectrum [1, T, 128] that the network takes."""
    with torch.no_grad():
        spectrum: torch.Tensor = estimator.wav2mel(samples, SAMPLE_RATE_HZ)
    return spectrum


def pitch_hz(estimator: Any, run: Estimate, spectrum: torch.Tensor) -> torch.Tensor:
    """The pitch of every frame, by the network `run` and the decoder of `estimator`; 0 where there is none."""
    with torch.no_grad():
        cents = estimator.model.latent2cents_local_decoder(run(spectrum))
        pitch: torch.Tensor = estimator.model.cent_to_f0(cents).flatten()
    return pitch


def largest_difference_cents(one_hz: torch.Tensor, other_hz: torch.Tensor) -> float:
    """The largest difference of two pitches of the same frames; infinite if one of them has a pitch where the other
    has none.
    """
    voiced = one_hz > 0
    if not torch.equal(voiced, other_hz > 0):
        return math.inf
    differences = 1200 * torch.log2(one_hz[voiced].double() / other_hz[voiced].double())
    return float(differences.abs().max()) if len(differences) else 0.0


def interleaved_latency_ms(one: Estimate, other: Estimate, spectrum: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Medians of both, called in turn."""
    times_ms: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(rounds):
            for run, own_ms in zip((one, other), times_ms, strict=True):
                start_s = time.perf_counter()
                run(spectrum)
                own_ms.append(1e3 * (time.perf_counter() - start_s))
    return statistics.median(times_ms[0]), statistics.median(times_ms[1])


if __name__ == "__main__":
    sys.exit(main())
