"""Models as users have them in files of their own; goldens show these lines."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.clamp(self.norm(self.conv(x)), 0, 6)
        return {"scores": self.head(y)}


class Clip(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, 0, 6)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Sort(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        return torch.sort(y, dim=1).values


class Many(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = [torch.sort(x, dim=1).values, torch.sort(x, dim=2).values, torch.argsort(x, dim=1)]
        y += [torch.cumsum(x, dim=1), torch.cumprod(x, dim=1), torch.logcumsumexp(x, dim=1)]
        y += [torch.linalg.inv(x), torch.median(x)]
        return [*y, torch.mode(x, dim=1).values, torch.kthvalue(x, 1, dim=1).values]


def make() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(1, 3, 8, 8)


def clip() -> tuple[nn.Module, torch.Tensor]:
    return Clip(), torch.randn(1, 16)


def branch() -> tuple[nn.Module, torch.Tensor]:
    return Branch(), torch.randn(1, 3, 8, 8)


def unsupported() -> tuple[nn.Module, torch.Tensor]:
    return Sort(), torch.randn(1, 3, 8, 8)


def many_unsupported() -> tuple[nn.Module, torch.Tensor]:
    return Many(), torch.randn(1, 8, 8)
