"""The benchmark of networks that others have trained: words, their images, what scores say, and what is written."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.separate.ocr import __main__ as benchmark
from benchmarks.separate.ocr import models
from benchmarks.separate.ocr.words import HEIGHT, PAGE, WIDTH, images_of, pages, words

CLASSES = 1 + len(models.CHARACTERS)


def test_words_are_the_same_for_a_seed_and_of_characters_that_can_be_read() -> None:
    found = words(300, seed=1)
    assert found == words(300, seed=1)
    assert found != words(300, seed=2)
    assert len(set(found)) > 250
    assert all(3 <= len(one) <= 8 and set(one) <= set(models.CHARACTERS) for one in found)
    assert any(one.isdigit() for one in found)


def test_images_show_their_words_and_are_the_same_for_a_seed() -> None:
    found = images_of(["III", "WWWWWWWW"], seed=3)
    assert found.shape == (2, 1, HEIGHT, WIDTH)
    assert found.dtype == torch.float32
    assert -1 <= float(found.min()) < -0.2 < 0.2 < float(found.max()) <= 1
    assert torch.equal(found, images_of(["III", "WWWWWWWW"], seed=3))
    assert torch.equal(found[0, :, :, -20:], found[0, :, :, -1:].expand(1, HEIGHT, 20)), "the short word ends before"
    assert not torch.equal(found[1, :, :, -20:], found[1, :, :, -1:].expand(1, HEIGHT, 20))


def test_pages_are_normalised_in_three_equal_channels() -> None:
    found = pages(2, seed=1)
    assert found.shape == (2, 3, PAGE, PAGE)
    assert torch.equal(found, pages(2, seed=1))
    torch.testing.assert_close(found[:, 0] * 0.229 + 0.485, found[:, 2] * 0.225 + 0.406)


def test_scores_are_read_without_blanks_and_repetitions() -> None:
    def scores(*classes: int) -> torch.Tensor:
        return nn.functional.one_hot(torch.tensor([classes]), CLASSES).float()

    h, e, l, o = (1 + models.CHARACTERS.index(one) for one in "helo")  # noqa: E741
    assert models.texts_of(scores(0, h, h, e, l, 0, l, l, o, 0)) == ["hello"]
    assert models.texts_of(scores(0, 0, 0)) == [""]


def test_a_missing_package_is_named_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "WEIGHTS", "a_package_that_is_not_there")
    monkeypatch.setattr(models, "ARCHITECTURES", "a_package_that_is_not_there")
    monkeypatch.delitem(sys.modules, models.STAND_IN, raising=False)
    assert benchmark.main(["--output", str(tmp_path)]) == 2
    assert "pip install --no-deps easyocr==1.7.2" in capsys.readouterr().err


def test_overlap_is_of_what_either_has() -> None:
    one, other = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 1, 1, 0]).bool()
    assert benchmark.overlap(one, other) == pytest.approx(200 / 3)
    assert benchmark.overlap(other, other) == 100


def test_errors_are_relative_to_what_was_before() -> None:
    before = torch.tensor([3.0, 4.0])
    assert benchmark.relative_error(before, before + torch.tensor([0.0, 0.5])) == pytest.approx(0.1)


class Parts(nn.Module):
    """As EasyOCR has them, smaller: the recurrent part keeps the width of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.FeatureExtraction = nn.Sequential(nn.Conv2d(1, 32, 3, 4, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1))
        self.SequenceModeling = nn.Linear(32, 16)
        self.Prediction = nn.Linear(16, CLASSES)


def test_another_trunk_takes_the_place_of_the_first_in_a_copy() -> None:
    model = models.Recognizer(Parts()).eval()
    x = torch.randn(1, 1, HEIGHT, WIDTH)
    with torch.no_grad():
        before = model(x)
        assert before.shape == (1, WIDTH // 4, CLASSES)
        other = nn.Sequential(model.trunk, nn.Tanh())
        assert not torch.equal(benchmark.with_trunk(model, other)(x), before)
        assert torch.equal(model(x), before)


def test_what_was_measured_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(benchmark, "recognizer", lambda: models.Recognizer(Parts()).eval())
    monkeypatch.setattr(benchmark, "UNLABELLED_WORDS", 16)
    arguments = ["--networks", "recognizer", "--words", "8", "--rounds", "3", "--speedups", "1.1"]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 0
    dense, separated = benchmark.read(tmp_path / "separate_ocr.json")
    assert (dense.wanted, dense.error, separated.wanted) == (1.0, 0.0, 1.1)
    assert separated.speedup > 0
    assert 0 < separated.error < 1
    assert "1.1×: measured" in (tmp_path / "separate_ocr.txt").read_text()


@pytest.mark.skipif(
    any(importlib.util.find_spec(one) is None for one in (models.ARCHITECTURES, models.WEIGHTS)),
    reason="EasyOCR's packages are not installed",
)
def test_the_recogniser_reads_words_and_the_detector_sees_where_they_are() -> None:
    texts = words(20, seed=5)
    with torch.inference_mode():
        found = models.texts_of(models.recognizer()(images_of(texts, seed=6)))
        scores = models.detector()(pages(1, seed=7))
    assert sum(one == text for one, text in zip(found, texts, strict=True)) >= 16
    assert scores.shape == (1, PAGE // 2, PAGE // 2, 2)
    assert 0.01 < float((scores[..., 0] > benchmark.TEXT_SCORE).float().mean()) < 0.5
