"""Words, and images of them, alone or on pages: fonts, sizes, tones, blur and noise are drawn with a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HEIGHT: Final = 64
"""Of an image of a word, in pixels: what the recogniser was trained for."""
WIDTH: Final = 192
PAGE: Final = 256
ONSETS: Final = "b c d f g h k l m n p r s t v w br cl dr fr gr pl pr sh sl sp st th tr".split()
VOWELS: Final = "a e i o u ai ea ee oa ou".split()
CODAS: Final = ["", *"n r s t l m d ck nd ng nt rd rs st".split()]
FONTS: Final = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
]
NUMBERS: Final = 0.15
"""The share of words that are numbers."""


def words(count: int, seed: int) -> list[str]:
    """So many words of one to three syllables in small, capitalised or capital letters, and some numbers."""
    source = np.random.default_rng(seed)
    return [_word(source) for _ in range(count)]


def _word(source: np.random.Generator) -> str:
    if source.random() < NUMBERS:
        return str(source.integers(100, 10 ** int(source.integers(3, 7))))
    while True:
        parts = [source.choice(ONSETS) + source.choice(VOWELS) for _ in range(source.integers(1, 4))]
        word = "".join(parts) + str(source.choice(CODAS))
        if 3 <= len(word) <= 8:
            style = source.random()
            return word if style < 0.6 else word.capitalize() if style < 0.85 else word.upper()


def images_of(texts: Sequence[str], seed: int) -> torch.Tensor:
    """Images [N, 1, HEIGHT, WIDTH] of one word each, between -1 and 1."""
    source = np.random.default_rng(seed)
    pixels = np.stack([_image(text, source) for text in texts])
    return torch.from_numpy(pixels)[:, None] / 127.5 - 1


def _image(text: str, source: np.random.Generator) -> np.ndarray:
    paper, ink = _tones(source)
    font = _font(source, size=int(source.integers(28, 45)))
    while font.getlength(text) > WIDTH - 12:
        font = font.font_variant(size=int(font.size) - 1)
    x, y = int(source.integers(4, 9)), HEIGHT // 2 + int(source.integers(-5, 6))
    image = Image.new("L", (min(WIDTH, int(font.getlength(text)) + 2 * x), HEIGHT), paper)
    ImageDraw.Draw(image).text((x, y), text, ink, font, anchor="lm")
    image = image.rotate(float(source.uniform(-2, 2)), Image.Resampling.BILINEAR, fillcolor=paper)
    found = _worn(image, source)
    return np.pad(found, ((0, 0), (0, WIDTH - found.shape[1])), mode="edge")  # As EasyOCR does for its batches.


def pages(count: int, seed: int) -> torch.Tensor:
    """Images [N, 3, PAGE, PAGE] with several lines of words, normalised as the detector wants them."""
    source = np.random.default_rng(seed)
    grey = torch.from_numpy(np.stack([_page(source) for _ in range(count)]))[:, None] / 255
    means, deviations = (
        torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (grey - means) / deviations


def _page(source: np.random.Generator) -> np.ndarray:
    paper, ink = _tones(source)
    image = Image.new("L", (PAGE, PAGE), paper)
    draw, y = ImageDraw.Draw(image), int(source.integers(4, 30))
    while y < PAGE - 30:
        font, x = _font(source, size=int(source.integers(14, 28))), int(source.integers(4, 40))
        while x + font.getlength(text := _word(source)) < PAGE - 4:
            draw.text((x, y), text, ink, font)
            x += int(font.getlength(text) + source.integers(10, 40))
        y += int(font.size * source.uniform(1.4, 2.5))
    return _worn(image, source)


def _tones(source: np.random.Generator) -> tuple[int, int]:
    """Of paper and ink, either of them the darker."""
    dark, light = int(source.integers(0, 90)), int(source.integers(160, 256))
    return (light, dark) if source.random() < 0.75 else (dark, light)


def _font(source: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib as mpl

    # The fonts of Debian's fonts-dejavu, which matplotlib brings along.
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{source.choice(FONTS)}.ttf"), size)


def _worn(image: Image.Image, source: np.random.Generator) -> np.ndarray:
    """`image` blurred and with noise, as float32."""
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(float(source.uniform(0, 1.5)))), np.float32)
    noise = source.normal(0, source.uniform(10, 50), blurred.shape)
    return np.clip(blurred + noise, 0, 255).astype(np.float32)
