"""Whether weights that were compiled as constants are still what they were.

PyTorch counts the writes to a tensor: by optimizers, `load_state_dict`, any operator in place. Another tensor in place
of one, and other memory in the same tensor (``parameter.data = …``), are seen by themselves. Only writes through
``parameter.data`` or an array of numpy leave no trace but the values: of these, a sample of each weight is compared, at
every call. An update of all of a weight, as of an optimizer or a running average, changes it; one of single elements
may escape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Elements of each weight that are compared.
SAMPLES = 16


class Weights:
    """Tensors as they were when this was made. They may die: then `forget` is called."""

    def __init__(self, tensors: Sequence[torch.Tensor], forget: Callable[[], Any]) -> None:
        self._references = [weakref.ref(tensor, lambda _: forget()) for tensor in tensors]
        self._samples = [_sample(tensor) for tensor in tensors]
        self._marks = _marks(tensors)
        self._values = self._read()

    def hold(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether `tensors`, the same objects, are unchanged."""
        return _marks(tensors) == self._marks and torch.equal(self._read(), self._values)

    def _read(self) -> torch.Tensor:
        # As bytes, since NaN is not equal to itself.
        return torch.cat([*self._samples, _NOTHING]).view(torch.uint8)


_NOTHING = torch.empty(0)


def _marks(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(tensor._version, tensor.data_ptr(), tensor.stride()) for tensor in tensors]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some elements of `tensor`, evenly spaced, in its own memory; only of its first row if there are gaps in it."""
    own = tensor.detach()
    if not own.numel():
        return own.new_empty(0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True))
    if extent == own.numel():
        flat = own.as_strided((extent,), (1,))
    else:
        flat = own[(0,) * (own.dim() - 1)]
    return flat[:: -(-len(flat) // SAMPLES)]
