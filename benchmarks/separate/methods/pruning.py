"""Structured pruning by the library Torch-Pruning (Fang, Ma, Song, Mi, Wang, CVPR 2023).

Whole channels are removed, everywhere they reach, of which the weights that they are coupled with have the least norm,
the same share of them in each group of coupled layers. Widths are rounded to whole vectors where the library can.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Final

import torch
from torch import nn

from benchmarks.separate.methods.method import Method

ROUND_TO: Final = 16
# The library leaves layers alone that would lose all channels: of 64, a vector remains.
MOST: Final = 0.75


class Pruning(Method):
    """Fewer channels; the strength is the share of channels that is removed."""

    name = "pruning"
    title: ClassVar[str] = "structured pruning"

    def compress(self, model: nn.Module, example: torch.Tensor, strength: float) -> nn.Module:
        import torch_pruning

        result = copy.deepcopy(model)
        linear = [one for one in result.modules() if isinstance(one, nn.Linear)]
        with torch.enable_grad():  # It follows the graph of gradients to see what belongs together.
            pruner = torch_pruning.pruner.BasePruner(
                result,
                example,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=min(strength, MOST),
                round_to=ROUND_TO,
                ignored_layers=linear[-1:],  # Its results are the classes.
            )
            pruner.step()
        return result.eval()
