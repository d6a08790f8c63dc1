"""The models that are measured and tested: architectures from timm and torchvision with random, but lively, parameters.

Freshly initialised networks are poor test subjects. Batch normalisation starts as the identity, so folding it is never
really tested; layer scales start at 1e-6 and some last scales of a block at 0, so whole branches do not reach the
output, and an error in them goes unseen. Here every such parameter is drawn at random, from a fixed seed, and the
running statistics of batch normalisation are drawn around what the layer really receives, so that activations stay of
order one through any depth.

MobileOne comes reparametrised. timm makes it as it is trained, with several branches side by side in every layer, which
its authors merge into one convolution before the model is used; nobody would run it otherwise. All runners get the same
merged model, eager included. RepViT stays as timm makes it, so that its figures remain comparable with earlier ones;
what is to be merged there, one cheap 1×1 depthwise convolution per block, sepc merges by itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

SEED = 2024
NEXT_TO_NOTHING = 1e-3
RANDOM_SCORES = 2.5
LEAST_LOGITS, MOST_LOGITS = 0.5, 2.0
DEFAULT_SIZE = 224
TORCHVISION = "torchvision/"
TESTED = (
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
    "efficientnet_b0",
    "xception41",
    "convnext_tiny",
    "fasternet_t0",
    "repvit_m1_1",
    "ghostnet_100",
    "resnet50",
    "deeplabv3_mobilenet_v3_large",
)
"""Those that the tests compile for every kind of target."""
_TORCHVISION_SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
_REPARAMETRISED = ("mobileone_",)
_CALIBRATION_BATCH = 2


def default_size(name: str) -> int:
    """Side in pixels of the square image on which model `name` is measured unless a size is asked for.

    It is the size for which the authors of a timm model made it, as xception41 is for 299; some accept no other.
    """
    if _in_torchvision(name):
        return DEFAULT_SIZE
    from timm.models import get_pretrained_cfg

    configuration = get_pretrained_cfg(name)
    return int(configuration.input_size[-1]) if configuration is not None else DEFAULT_SIZE


def load(name: str, size: int | None = None, batch: int = 1) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model in eval mode, with reproducible random parameters, and inputs for it.

    The parameters depend on `name` alone, so the same model can be tried at several sizes and batches.

    Args:
        name: a timm model, one of torchvision's as "torchvision/<name>", or a segmentation model of torchvision.
        size: side of the square input in pixels; by default `default_size(name)`.
        batch: number of images.

    Returns:
        the model, and its inputs: one float32 tensor [batch, 3, size, size].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = _create(name).eval()
        generator = torch.Generator().manual_seed(SEED)
        _draw_parameters(model, generator)
        _calibrate(model, images(default_size(name), _CALIBRATION_BATCH, generator), generator)
        if name.startswith(_REPARAMETRISED):
            model = _reparametrised(model)
    inputs = images(size or default_size(name), batch, torch.Generator().manual_seed(SEED + 1))
    return model.requires_grad_(False), (inputs,)


def images(size: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Random images [batch, 3, size, size] with detail at every scale.

    White noise alone would be averaged away by global pooling, and all images would look the same to a classifier.
    """
    total = torch.randn(batch, 3, size, size, generator=generator)
    for cells in (1, 4, 16):
        coarse = torch.randn(batch, 3, cells, cells, generator=generator)
        total += nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return total / 2.0


def _create(name: str) -> nn.Module:
    """The bare architecture; nothing is downloaded."""
    if _in_torchvision(name):
        return _from_torchvision(name.removeprefix(TORCHVISION))
    import timm

    return timm.create_model(name, pretrained=False)


def _in_torchvision(name: str) -> bool:
    return name.startswith(TORCHVISION) or name in _TORCHVISION_SEGMENTATION


def _from_torchvision(name: str) -> nn.Module:
    from torchvision.models import detection, get_model, list_models, segmentation

    is_detector = name in list_models(module=detection)
    with_backbone = is_detector or name in list_models(module=segmentation)
    model = get_model(name, weights=None, **({"weights_backbone": None} if with_backbone else {}))
    if is_detector and hasattr(model, "roi_heads"):
        # Made for trained networks; the scores of random ones are near one part in so many classes.
        classes = model.roi_heads.box_predictor.cls_score.out_features
        model.roi_heads.score_thresh = min(model.roi_heads.score_thresh, RANDOM_SCORES / classes)
    return Detector(model) if is_detector else cast("nn.Module", model)


class Detector(nn.Module):
    """One of torchvision's detectors, which take a list of images, as a function of one tensor of images."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> Any:
        """What the detector finds in each of `images` [batch, 3, height, width], by label and place.

        Detectors give it by score, and random ones give many scores that differ by rounding errors alone.
        """
        found = self.detector(list(images))
        return [_by_place(one) for one in found] if isinstance(found, list) else found


def _by_place(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    boxes = found["boxes"]
    place = boxes @ torch.tensor([1.0, 0.618, 0.414, 0.303], device=boxes.device)
    by_place = place.argsort()
    order = by_place[found["labels"][by_place].argsort(stable=True)]
    return {name: values[order] for name, values in found.items()}


def _reparametrised(model: nn.Module) -> nn.Module:
    """The model as it is deployed: branches side by side, with their normalisations, merged into one convolution."""
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


def _draw_parameters(model: nn.Module, generator: torch.Generator) -> None:
    """Draw scales from [0.5, 1.5], shifts from a normal distribution; large weights keep their initialisation.

    Unless that is next to nothing, as in the classifiers of mixers and in tables of relative positions.
    """
    for module in model.modules():
        is_product = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name:
                parameter.data.normal_(0.0, 0.1, generator=generator)
            elif not is_product and parameter.numel() == max(parameter.shape, default=1):
                # Norm weights, layer scales, gates: vectors, perhaps with broadcast dimensions of size one.
                parameter.data.uniform_(0.5, 1.5, generator=generator)
            else:
                usual = (parameter.numel() / parameter.shape[0]) ** -0.5 if is_product else 0.1
                if parameter.square().mean().sqrt() < NEXT_TO_NOTHING * usual:
                    parameter.data.normal_(0.0, usual, generator=generator)


def _calibrate(model: nn.Module, sample: torch.Tensor, generator: torch.Generator) -> None:
    """Draw running statistics and bound logits, layer after layer, while `sample` runs through the model."""
    hooks = [*_batch_norm_hooks(model, generator), *_logit_hooks(model)]
    try:
        with torch.no_grad():
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()


def _batch_norm_hooks(model: nn.Module, generator: torch.Generator) -> list[RemovableHandle]:
    """Draw running statistics, each scaled by the root mean square of its layer's input."""

    def draw(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
            return
        mean_square = float(arguments[0].square().mean()) + 1e-6
        module.running_mean.normal_(0.0, 0.1 * mean_square**0.5, generator=generator)
        module.running_var.uniform_(0.5 * mean_square, 1.5 * mean_square, generator=generator)

    return [module.register_forward_pre_hook(draw) for module in model.modules() if isinstance(module, _BatchNorm)]


def _logit_hooks(model: nn.Module) -> list[RemovableHandle]:
    """Scale the last layers of a detector's classifier, so that its logits deviate neither too much nor too little.

    Without normalisation they can be so large that the best scores are 1 whatever the image is. After a second stage
    they can be so small that no class stands out, and nothing is found at all.
    """

    def one_stage(head: Any, _: Any, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = outputs["cls_logits"]
        factor = min(1.0, MOST_LOGITS / float(logits.std()))
        for layer in head.classification_head.modules():
            if isinstance(layer, nn.Conv2d) and layer.out_channels % logits.shape[-1] == 0:
                _scale(layer, factor)
        return {**outputs, "cls_logits": logits * factor}

    def two_stages(predictor: Any, _: Any, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        factor = max(1.0, LEAST_LOGITS / float(outputs[0].std()))
        _scale(predictor.cls_score, factor)
        return outputs[0] * factor, *outputs[1:]

    if not isinstance(model, Detector):
        return []
    if hasattr(model.detector, "roi_heads"):
        return [cast("Any", model.detector).roi_heads.box_predictor.register_forward_hook(two_stages)]
    return [cast("Any", model.detector).head.register_forward_hook(one_stage)]


def _scale(layer: nn.Conv2d | nn.Linear, factor: float) -> None:
    layer.weight.data *= factor
    if layer.bias is not None:
        layer.bias.data *= factor
