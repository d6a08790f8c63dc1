"""Whether weights that were compiled as constants are still what they were.

PyTorch counts the writes to a tensor: by optimizers, `load_state_dict`, any operator in place. Another tensor in place
of one, and other memory in the same tensor (``parameter.data = …``), are seen by themselves. Only writes through
``parameter.data`` or an array of numpy leave no trace but the values: of these, a sample of each weight is compared, at
every call. An update of all of a weight, as of an optimizer or a running average, changes it; one of single elements
may escape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch

# Elements of each weight that are compared, in two runs: each run is a cache miss where a model does not fit the cache.
SAMPLES = 16


class Weights:
    """Tensors as they were when this was made. They may die: then `forget` is called."""

    def __init__(self, tensors: Sequence[torch.Tensor], forget: Callable[[], Any]) -> None:
        self._references = [weakref.ref(tensor, lambda _: forget()) for tensor in tensors]
        self._samples = [_bytes(one) for one in chain.from_iterable(map(_samples, tensors))]
        self._marks = _marks(tensors)
        self._values = self._read()

    def hold(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether `tensors`, the same objects, are unchanged."""
        return _marks(tensors) == self._marks and self._read() == self._values

    def _read(self) -> bytes:
        # torch.cat of some hundred tensors takes ten times as long.
        return b"".join(self._samples)


_MARKS: tuple[Callable[[torch.Tensor], Any], ...] = (
    attrgetter("_version"),
    torch.Tensor.data_ptr,
    torch.Tensor.stride,
)


def _marks(tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
    # Not one tuple per tensor: there are hundreds of them, and this is a part of every call.
    return [list(map(mark, tensors)) for mark in _MARKS]


def _samples(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of some elements of `tensor`, each contiguous; of its first one only if there are gaps between them."""
    own = tensor.detach()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True))
    if not own.numel():
        return
    if extent != own.numel():
        yield own.as_strided((1,), (1,))
        return
    flat = own.as_strided((extent,), (1,))
    if extent <= SAMPLES:
        yield flat
    else:
        for third in (extent // 3, extent - extent // 3):
            yield flat[third : third + SAMPLES // 2]


def _bytes(sample: torch.Tensor) -> memoryview:
    # Bytes, since numpy does not know every type, and NaN is not equal to itself.
    return sample.view(torch.uint8).numpy().data
