"""What a call does to memory, beside computing: which tensors it writes to, and which its results share memory with.

Callers see this: who writes to a result that is a view of an input writes to the input.
"""

from __future__ import annotations

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
        is_input: whether it is that input itself, and no other tensor of its memory.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    shares: Place | None
    offset: int = field(default=0, compare=False)
    is_input: bool = field(default=False, compare=False)

    @property
    def end(self) -> int:
        """The place behind its last element in its memory."""
        return self.offset + 1 + sum(stride * (size - 1) for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def overlaps_itself(self) -> bool:
        """Whether elements may share a place."""
        behind = 0  # how far the dimensions of smaller strides reach
        for stride, size in sorted(
            (stride, size) for stride, size in zip(self.strides, self.shape, strict=True) if size > 1
        ):
            if stride <= behind:
                return True
            behind += stride * (size - 1)
        return False


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
        is_input = any(one is given for given in inputs)
        effect = TensorEffect(tuple(one.shape), strides, one.dtype, one.requires_grad, shares, offset, is_input)
        effects.append(effect)
    return effects


def misplaced(expected: Sequence[Effect], found: Sequence[Effect]) -> list[int]:
    """The results that `put_right` has to move, as some lie elsewhere in memory than PyTorch's, in their order.

    Raises ModelError with the first difference that cannot be mended.
    """
    if len(expected) != len(found):
        raise ModelError("Compiled results are not those of PyTorch", why=f"{len(found)} instead of {len(expected)}")
    wrong = [index for index, wanted in enumerate(expected) if wanted != found[index]]
    together = {_whose_memory(expected[index], index) for index in wrong}
    places = [index for index, wanted in enumerate(expected) if _whose_memory(wanted, index) in together]
    for index in places:
        wanted, given = expected[index], found[index]
        difference = f"result {index}: {given}, not {wanted}"
        if not isinstance(wanted, TensorEffect) or not isinstance(given, TensorEffect) or not _fits(wanted, given):
            raise ModelError("Compiled results are not those of PyTorch", why=difference)
        of_input = wanted.shares is not None and wanted.shares.kind == "input"
        other_type = wanted.shares is not None and wanted.shares.dtype != wanted.dtype
        if other_type or (wanted.overlaps_itself and not of_input):
            raise ModelError("Compiled results do not lie in memory as those of PyTorch", why=difference)
    return places


def _whose_memory(effect: Effect, index: int) -> tuple[str, int]:
    """The first tensor in the memory where result number `index` lies."""
    shares = effect.shares if isinstance(effect, TensorEffect) else None
    return ("result", index) if shares is None else (shares.kind, shares.index)


def _fits(wanted: TensorEffect, given: TensorEffect) -> bool:
    """Whether a result has the right elements; a view of an input gets its need of a gradient from that."""
    is_view = wanted.shares is not None and wanted.shares.kind == "input"
    same = (wanted.shape, wanted.dtype) == (given.shape, given.dtype)
    return same and (is_view or wanted.requires_grad == given.requires_grad)


def put_right(results: Any, places: Sequence[int], expected: Sequence[Effect], inputs: Sequence[Any]) -> Any:
    """The `results` of a call, those at `places` moved to where PyTorch has them: into `inputs`, or new memory."""
    leaves, structure = pytree.tree_flatten(results)
    moved = {index: wanted for index in places if isinstance(wanted := expected[index], TensorEffect)}
    memories: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}
    for index, wanted in moved.items():
        kind, first = owner = _whose_memory(wanted, index)
        if kind == "input":
            base = inputs[first]
            same = wanted.is_input and (base.shape, base.storage_offset()) == (wanted.shape, wanted.offset)
            leaves[index] = base if same else base.as_strided(wanted.shape, wanted.strides, wanted.offset)
            continue
        if owner not in memories:
            beside = [one for number, one in moved.items() if _whose_memory(one, number) == owner]
            start = min(one.offset for one in beside)
            memories[owner] = torch.empty(max(one.end for one in beside) - start, dtype=wanted.dtype), start
        memory, start = memories[owner]
        leaves[index] = memory.as_strided(wanted.shape, wanted.strides, wanted.offset - start).copy_(leaves[index])
    return pytree.tree_unflatten(leaves, structure)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of `module`, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
