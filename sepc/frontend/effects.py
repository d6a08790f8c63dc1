"""What a call does to memory, beside computing: which tensors it writes to, and which its results share memory with.

Callers see this: who writes to a result that is a view of an input writes to the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from sepc.errors import ModelError


@dataclass(frozen=True)
class TensorEffect:
    """A tensor among the results of a call.

    Attributes:
        strides: of dimensions larger than 1; 0 for the others.
        shares: the first tensor that it shares memory with, an input or an earlier result; empty if there is none.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    shares: str


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
    storages: dict[int, str] = {}

    def shared(tensor: torch.Tensor, name: str) -> str:
        if not tensor.numel():
            return ""
        found = storages.setdefault(tensor.untyped_storage()._cdata, name)
        return "" if found == name else found

    effects: list[Effect] = []
    for index, one in enumerate(inputs):
        if isinstance(one, torch.Tensor):
            shared(one, f"input {index}")
    for index, one in enumerate(pytree.tree_leaves(results)):
        if not isinstance(one, torch.Tensor):
            effects.append(one)
            continue
        strides = tuple(stride if size > 1 else 0 for size, stride in zip(one.shape, one.stride(), strict=True))
        shares = shared(one, f"result {index}")
        effects.append(TensorEffect(tuple(one.shape), strides, one.dtype, one.requires_grad, shares))
    return effects


def require_same(expected: Sequence[Effect], found: Sequence[Effect]) -> None:
    """Nothing if effects are equal; else raises ModelError with the first difference."""
    if len(expected) != len(found):
        raise ModelError("Compiled results are not those of PyTorch", why=f"{len(found)} instead of {len(expected)}")
    for index, (wanted, given) in enumerate(zip(expected, found, strict=True)):
        if wanted != given:
            raise ModelError(
                "Compiled results do not lie in memory as those of PyTorch",
                why=f"result {index}: {given}, not {wanted}",
            )


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of `module`, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
