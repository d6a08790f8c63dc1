"""What a call does to memory, beside computing: which tensors it writes to, and which its results share memory with.

Callers see this: who writes to a result that is a view of an input writes to the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from sepc.errors import ModelError


@dataclass(frozen=True)
class Place:
    """A tensor that a call reads or gives: input or result number `index`, of type `dtype`."""

    kind: Literal["input", "result"]
    index: int
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorEffect:
    """A tensor among the results of a call.

    Attributes:
        strides: of dimensions larger than 1; 0 for the others.
        shares: the first tensor that it shares memory with, an input or an earlier result, if there is one.
        offset: where it begins in its memory, in elements, which callers do not see.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    shares: Place | None
    offset: int = field(default=0, compare=False)

    @property
    def elements(self) -> range:
        """Where its elements lie in its memory."""
        steps = (stride * (size - 1) for size, stride in zip(self.shape, self.strides, strict=True))
        return range(self.offset, self.offset + sum(steps) + 1)

    @property
    def is_dense(self) -> bool:
        """Whether it fills its part of memory without gaps or overlaps."""
        return math.prod(self.shape) in (0, len(self.elements))


Effect = TensorEffect | object
"""Of a result that is no tensor the value itself."""


def expected_effects(graph_module: fx.GraphModule, args: Sequence[Any]) -> list[Effect]:
    """What a call of `graph_module` in PyTorch gives, found out on tensors without memory.

    Raises ModelError if it writes to what it is called with or to what it holds, or PyTorch cannot tell.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(mode=False), torch.no_grad():
        given = [_stand_in(one, mode) if isinstance(one, torch.Tensor) else one for one in args]
        held = {name: _stand_in(one, mode) for name, one in state(graph_module).items()}
        tensors = [one for one in (*given, *held.values()) if isinstance(one, torch.Tensor)]
        versions = [one._version for one in tensors]
        try:
            with mode:
                results = torch.func.functional_call(graph_module, held, tuple(given))
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise ModelError("A graph cannot be run on tensors without memory", why=why) from error
        if [one._version for one in tensors] != versions:
            raise ModelError("A graph changes its inputs, or a buffer of the model", fix="return a new tensor")
        return effects_of(results, [*given, *held.values()])


def _stand_in(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """`tensor` without memory; one that counts writes, which those made in inference mode do not."""
    if not tensor.is_inference():
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def effects_of(results: Any, inputs: Sequence[Any]) -> list[Effect]:
    """What a call with `inputs`, all that it may have read, has given."""
    storages: dict[int, Place] = {}

    def shared(tensor: torch.Tensor, place: Place) -> Place | None:
        if not tensor.numel():
            return None
        found = storages.setdefault(tensor.untyped_storage()._cdata, place)
        return None if found == place else found

    effects: list[Effect] = []
    for index, one in enumerate(inputs):
        if isinstance(one, torch.Tensor):
            shared(one, Place("input", index, one.dtype))
    for index, one in enumerate(pytree.tree_leaves(results)):
        if not isinstance(one, torch.Tensor):
            effects.append(one)
            continue
        strides = tuple(stride if size > 1 else 0 for size, stride in zip(one.shape, one.stride(), strict=True))
        shares, offset = shared(one, Place("result", index, one.dtype)), int(one.storage_offset())
        effects.append(TensorEffect(tuple(one.shape), strides, one.dtype, one.requires_grad, shares, offset))
    return effects


def misplaced(expected: Sequence[Effect], found: Sequence[Effect]) -> list[int]:
    """The results that lie elsewhere in memory than PyTorch's, all of which `put_right` can mend.

    Raises ModelError with the first difference that it cannot.
    """
    if len(expected) != len(found):
        raise ModelError("Compiled results are not those of PyTorch", why=f"{len(found)} instead of {len(expected)}")
    places = [index for index, wanted in enumerate(expected) if wanted != found[index]]
    for index in places:
        wanted, given = expected[index], found[index]
        if not isinstance(wanted, TensorEffect) or not isinstance(given, TensorEffect) or not _fits(wanted, given):
            raise ModelError("Compiled results are not those of PyTorch", why=f"result {index}: {given}, not {wanted}")
        if not _can_be_placed(wanted, expected):
            raise ModelError(
                "Compiled results do not lie in memory as those of PyTorch",
                why=f"result {index}: {given}, not {wanted}",
            )
    return places


def _fits(wanted: TensorEffect, given: TensorEffect) -> bool:
    """Whether a result has the right elements; a view of an input gets its need of a gradient from that."""
    is_view = wanted.shares is not None and wanted.shares.kind == "input"
    same = (wanted.shape, wanted.dtype) == (given.shape, given.dtype)
    return same and (is_view or wanted.requires_grad == given.requires_grad)


def _can_be_placed(wanted: TensorEffect, expected: Sequence[Effect]) -> bool:
    """Whether a result can be had in memory of its own, as part of an input, or as part of an earlier result."""
    if wanted.shares is None:
        return wanted.is_dense
    if wanted.shares.dtype != wanted.dtype:
        return False
    if wanted.shares.kind == "input":
        return True
    base = expected[wanted.shares.index]
    # What a base with gaps has between its elements is not among the results.
    return isinstance(base, TensorEffect) and base.is_dense and _contains(base.elements, wanted.elements)


def _contains(whole: range, part: range) -> bool:
    return whole.start <= part.start and part.stop <= whole.stop


def put_right(results: Any, places: Sequence[int], expected: Sequence[Effect], inputs: Sequence[Any]) -> Any:
    """The `results` of a call, those at `places` moved to where PyTorch has them: into `inputs`, results, or apart."""
    leaves, structure = pytree.tree_flatten(results)
    for index in places:
        wanted = expected[index]
        assert isinstance(wanted, TensorEffect)
        if wanted.shares is None:
            fresh = torch.empty_strided(wanted.shape, wanted.strides, dtype=wanted.dtype)
            leaves[index] = fresh.copy_(leaves[index])
        elif wanted.shares.kind == "input":
            leaves[index] = inputs[wanted.shares.index].as_strided(wanted.shape, wanted.strides, wanted.offset)
        else:
            base, whole = leaves[wanted.shares.index], expected[wanted.shares.index]
            assert isinstance(whole, TensorEffect)
            offset = base.storage_offset() + wanted.offset - whole.offset
            leaves[index] = base.as_strided(wanted.shape, wanted.strides, offset)
    return pytree.tree_unflatten(leaves, structure)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of `module`, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
