"""The models under test: reproducible, lively, and with batch normalisation that is worth folding."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from benchmarks import models
from benchmarks.models import default_size, load


def outputs(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        return tree_leaves(model(*inputs))


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv2_100",
        "convnext_atto",
        "deeplabv3_mobilenet_v3_large",
        "inception_next_tiny",
        "edgenext_small",
        "convformer_s18",
        "mobileone_s1",
    ],
)
def test_outputs_are_finite_and_depend_on_the_image(name: str) -> None:
    model, (images,) = load(name, 96, batch=2)
    assert not model.training
    assert images.shape == (2, 3, 96, 96)
    for output in outputs(model, images):
        assert output.isfinite().all()
        assert 0.01 < output.abs().max() < 1000.0
        # Far more than the tolerance of a comparison, or an error could hide.
        assert (output[0] - output[1]).abs().max() > 0.01 * output.abs().max()


def test_loading_twice_gives_the_same() -> None:
    torch.manual_seed(1)
    first, first_inputs = load("mobilenetv1_100", 64)
    torch.manual_seed(2)
    second, second_inputs = load("mobilenetv1_100", 64)
    assert torch.equal(first_inputs[0], second_inputs[0])
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_parameters_do_not_depend_on_size_and_batch() -> None:
    first, _ = load("mobilenetv1_100", 64)
    second, _ = load("mobilenetv1_100", 96, batch=2)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_loading_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load("mobilenetv1_100", 64)
    assert torch.equal(torch.rand(1), expected)


def test_batch_norm_is_no_identity() -> None:
    model, _ = load("resnet18", 64)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert values is not None
            assert values.std() > 0.0
        assert norm.weight.min() >= 0.5


def test_layer_scales_let_every_branch_reach_the_output() -> None:
    model, _ = load("convnext_tiny", 64)
    gammas = [parameter for name, parameter in model.named_parameters() if name.endswith("gamma")]
    assert gammas
    assert min(float(gamma.min()) for gamma in gammas) >= 0.5


def test_mobileone_is_merged_and_computes_what_its_branches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    merged, inputs = load("mobileone_s0", 64, batch=2)
    monkeypatch.setattr(models, "_REPARAMETRISED", ())
    branches, _ = load("mobileone_s0", 64)
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) for model in (merged, branches)]
    assert norms[0] == 0 < norms[1]
    assert not merged.training
    torch.testing.assert_close(outputs(merged, *inputs), outputs(branches, *inputs), rtol=1e-4, atol=1e-4)


def test_default_size() -> None:
    assert default_size("xception41") == 299
    assert default_size("mobilenetv2_100") == 224
    _, (images,) = load("mobilenetv1_100")
    assert images.shape == (1, 3, 224, 224)


class _Head(nn.Module):
    """A detector's head: classes for each pixel, with logits as large as `scale` makes them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.classification_head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2 * 5, 1))
        self.classification_head[1].weight.data *= scale

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.classification_head(images)
        return {"cls_logits": logits.permute(0, 2, 3, 1).reshape(len(images), -1, 5)}


class _OneHead(nn.Module):
    """A detector that is nothing but its head."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.head = _Head(scale)

    def forward(self, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(self.head(torch.stack(images)))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_detectors_logits_are_scaled_if_they_would_saturate_its_scores(scale: float) -> None:
    torch.manual_seed(0)
    detector = models.Detector(_OneHead(scale))
    sample = torch.randn(2, 3, 8, 8)
    before = detector(sample)["cls_logits"]
    models._calibrate(detector, sample, torch.Generator())
    after = detector(sample)["cls_logits"]
    if scale == 1.0:
        assert torch.equal(after, before)
    else:
        assert before.std() > 2 * models.MOST_LOGITS
        torch.testing.assert_close(after.std().item(), models.MOST_LOGITS, rtol=1e-4, atol=0.0)
        torch.testing.assert_close(after * (before.std() / after.std()), before, rtol=1e-4, atol=1e-3)


class _TwoStages(nn.Module):
    """A detector that is nothing but the classifier of its second stage, with logits of the size `scale`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.roi_heads = nn.Module()
        self.roi_heads.box_predictor = FastRCNNPredictor(8, 5)
        self.roi_heads.box_predictor.cls_score.weight.data *= scale

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = cast("Any", self.roi_heads).box_predictor(torch.stack(images))[0]
        return logits


@pytest.mark.parametrize("scale", [10.0, 0.01])
def test_a_second_stages_logits_are_scaled_if_no_class_would_stand_out(scale: float) -> None:
    torch.manual_seed(0)
    detector = models.Detector(_TwoStages(scale))
    sample = torch.randn(64, 8)
    before = detector(sample)
    models._calibrate(detector, sample, torch.Generator())
    wanted = before.std().item() if scale > 1.0 else models.LEAST_LOGITS
    torch.testing.assert_close(detector(sample).std().item(), wanted, rtol=1e-4, atol=0.0)


def test_what_a_detector_finds_comes_in_an_order_that_rounding_does_not_change() -> None:
    torch.manual_seed(0)
    scores = torch.full((5,), 0.5)
    found = {"boxes": torch.rand(5, 4), "labels": torch.tensor([2, 1, 2, 1, 1]), "scores": scores}
    order = torch.randperm(5)
    wanted = models._by_place(found)
    assert wanted["labels"].tolist() == [1, 1, 1, 2, 2]
    for name, values in models._by_place({name: values[order] for name, values in found.items()}).items():
        assert torch.equal(values, wanted[name])
