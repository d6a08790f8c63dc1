"""Make the pictures of the documentation anew: ``make images``.

They show predictions for a Zen 5 core, so that they are the same wherever they are made.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from selenium.webdriver.common.by import By
from torch import nn

import sepc
from tests.browser import opened

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGET = "x86:znver5"


class Block(nn.Module):
    """An inverted residual block, as MobileNetV2 is made of, with a stem."""

    def __init__(self, channels: int = 16, factor: int = 6) -> None:
        super().__init__()
        inside = channels * factor
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels))
        self.expand = nn.Sequential(nn.Conv2d(channels, inside, 1, bias=False), nn.BatchNorm2d(inside), nn.ReLU6())
        self.depthwise = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
        self.project = nn.Conv2d(inside, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An image, as features of half its size."""
        x = self.stem(x)
        return x + self.project(self.depthwise(self.expand(x)).relu())


def main() -> None:
    """Write the pictures."""
    torch.manual_seed(0)
    block = sepc.explain(Block().eval(), torch.randn(1, 3, 224, 224), target=TARGET, num_threads=1)
    for name in ("fuse", "fold-batch-norm"):
        written = sepc.visualize(block, HERE / f"{name}.svg", around=name)
        # Links to source lines, from this folder.
        written.write_text(written.read_text().replace(f"{ROOT.as_uri()}/", "../../"))
    model = timm.create_model("mobilenetv2_100").eval()
    explanation = sepc.explain(model, torch.randn(1, 3, 224, 224), target=TARGET, num_threads=1)
    explanation.plot(HERE / "efficiency-gap.svg", "efficiency-gap")
    explanation.plot(HERE / "waterline.svg", "waterline")
    explanation.plot(HERE / "memory.svg", "memory")
    page = explanation.to_html(HERE / "report.html")
    with opened(page) as driver:
        driver.execute_script(
            "arguments[0].dispatchEvent(new MouseEvent('click'))", driver.find_element(By.CSS_SELECTOR, ".region")
        )
        driver.save_screenshot(str(HERE / "report.png"))
    page.unlink()


if __name__ == "__main__":
    main()
