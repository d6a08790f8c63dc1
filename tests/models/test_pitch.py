"""FCPE with its real weights, a network over time: the pitch that PyTorch finds, in our stages, and sooner."""

from __future__ import annotations

import torch

import sepc
from examples import pitch


def test_the_pitch_of_tones_is_that_of_pytorch_within_a_cent_and_sooner() -> None:
    estimator = pitch.load_estimator()
    torch.set_num_threads(1)
    compiled = sepc.compile(estimator.model)
    for tone_hz in pitch.TONES_HZ:
        spectrum = pitch.mel_spectrum(estimator, pitch.tone(tone_hz))
        reference = pitch.pitch_hz(estimator, estimator.model, spectrum)
        found = pitch.pitch_hz(estimator, compiled, spectrum)
        assert pitch.largest_difference_cents(reference, found) <= pitch.TOLERANCE_CENTS
        assert 1200 * abs(torch.log2(found.median() / tone_hz)) < 20, "it hears another tone than was played"
    convolutions = [one for one in compiled.regions if any("conv" in op for op in one.ops)]
    assert convolutions
    assert {one.kernel for one in convolutions} == {"sepc"}
    eager_ms, fast_ms = pitch.interleaved_latency_ms(estimator.model, compiled, spectrum, rounds=5)
    assert fast_ms < eager_ms
