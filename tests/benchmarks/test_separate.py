"""The benchmark of separation reads the data, says how to get it, and writes what it measured."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.separate import __main__ as benchmark
from benchmarks.separate import networks, ours
from benchmarks.separate.data import FOLDER_VARIABLE, Images, MissingDataError, load
from benchmarks.separate.results import CALIBRATED, DENSE, OURS, read
from benchmarks.separate.subject import with_means_of


def write_data(folder: Path, count: int) -> None:
    """Random images in the format of the package."""
    source = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        pixels = source.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = source.integers(0, 10, count, dtype=np.uint8)
        for name, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            (folder / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + values.tobytes()))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path, 128)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def tiny() -> nn.Module:
    return nn.Sequential(
        *networks.convolution(1, 48), nn.ReLU(), *networks.convolution(48, 48), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def test_images_are_read_and_normalised(data: Path) -> None:
    found = load(train=True)
    assert found.images.shape == (128, 1, 28, 28)
    assert found.labels.dtype == torch.long
    assert abs(float(found.images.mean())) < 1, "random pixels are brighter than clothes"
    assert not torch.equal(found.images, load(train=False).images)


def test_where_there_is_no_data_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(MissingDataError, match="apt install dataset-fashion-mnist"):
        load(train=False)
    assert benchmark.main([]) == 2
    assert FOLDER_VARIABLE in capsys.readouterr().err


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_classify_and_have_the_widths_they_say(name: str) -> None:
    model = networks.NETWORKS[name]().eval()
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, networks.CLASSES)
    widths = {one.out_channels for one in model.modules() if isinstance(one, nn.Conv2d)}
    assert widths == {64, 128, 256}


def test_training_is_kept_for_the_next_time(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny)
    monkeypatch.setattr(networks, "EPOCHS", 1)
    first = networks.trained("tiny", 3, data / "checkpoints")
    assert "tiny, seed 3: epoch 1/1" in capsys.readouterr().out
    again = networks.trained("tiny", 3, data / "checkpoints")
    assert capsys.readouterr().out == ""
    assert not again.training
    x = load(train=False).images
    with torch.no_grad():
        torch.testing.assert_close(first(x), again(x))  # Of other strides.


def test_accuracy_is_in_percent() -> None:
    labels = torch.arange(4) % 2
    images = Images(torch.nn.functional.one_hot(labels, 10).float(), labels)
    assert networks.accuracy(lambda x: x, images) == 100
    assert networks.accuracy(lambda x: x.roll(1, 1), images) == 0


def test_means_and_variances_are_those_of_the_images() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU()).eval(), 3 + 2 * torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        found = with_means_of(model, images)(images)
    assert abs(float(found.mean()) - 0.4) < 0.02, "of half a normal distribution"
    assert not with_means_of(model, images).training
    assert torch.equal(model(images), nn.functional.batch_norm(images, *STANDARD).relu()), "the original is not changed"


STANDARD = torch.zeros(1), torch.ones(1)


def test_what_was_measured_is_written(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(benchmark, "trained", lambda name, seed, folder: tiny().eval())
    monkeypatch.setattr(ours, "STEPS", 2)
    monkeypatch.setattr("benchmarks.separate.bisection.STEPS", 2)
    arguments = ["--networks", "vgg", "--seeds", "0", "--rounds", "3", "--distill-steps", "2", "--output", str(data)]
    assert benchmark.main([*arguments, "--methods", "sepc", "low-rank", "--speedups", "1.2", "1000"]) == 0
    rows = read(data / "separate.json")
    assert [(row.method, row.wanted) for row in rows[:2]] == [(DENSE, 1.0), (CALIBRATED, 1.2)]
    assert {row.method for row in rows} == {DENSE, *OURS, "low-rank"}
    assert all(row.speedup > 0 and 0 <= row.top1 <= 100 for row in rows)
    assert rows[1].multiply_adds > 1
    output = capsys.readouterr().out
    assert "1.2×: measured" in output
    assert "1000×: the most that all forms together are predicted to gain" in output
    assert "low-rank: 1000× is out of reach" in output
