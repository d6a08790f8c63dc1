"""A separated model beside the original that it learns from: what it is off by, and its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import nn

from sepc.cost_model.detect import host_cpu
from sepc.errors import ModelError
from sepc.separable.plan import Plan
from sepc.separation.data import Inputs, results_of

# The weight λ of layers' results beside the model's.
FEATURE_WEIGHT: Final = 0.1
# A processor with one of these computes in bfloat16 faster than in float32: as Linux names them.
HALF_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


class Student:
    """The model of `plan` beside `original`; copies of both, so that neither is changed.

    Args:
        original: in evaluation mode.
        plan: what to begin with.
        scales: what each replaced layer's results are multiplied with in what follows, [O].
        held_out: inputs that `error` is about.
    """

    def __init__(
        self, original: nn.Module, plan: Plan, scales: Mapping[str, torch.Tensor], held_out: Sequence[Inputs]
    ) -> None:
        self._model, self._teacher = plan.apply(original), copy.deepcopy(original)
        self._channels_last = _lay_out_channels_last((self._teacher, self._model), held_out[0])
        self._held_out = [self._prepared(inputs) for inputs in held_out]
        self._given: dict[str, torch.Tensor] = {}
        self._wanted: dict[str, torch.Tensor] = {}
        for path, scale in scales.items():
            _watch(self._teacher, path, scale, self._wanted)
            _watch(self._model, path, scale, self._given)
        for parameter in self._teacher.parameters():
            parameter.requires_grad_(False)
        self.parameters = [one for one in self._model.parameters() if one.is_floating_point()]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        with torch.no_grad():
            results = [results_of(self._teacher(*inputs)) for inputs in self._held_out]
            self._expected = [torch.cat(parts) for parts in zip(*results, strict=True)]
            self._variances = [_variance(one, 0) for one in self._expected]
            self._layer_variances = {path: _variance(one, 1) for path, one in self._wanted.items()}
        if not self._expected:
            raise ModelError("The model gives no floating-point tensors to learn", fix="leave distill_steps at 0")

    def loss(self, inputs: Inputs) -> torch.Tensor:
        """What is to be minimised, for one batch."""
        inputs = self._prepared(inputs)
        with _half_precision():
            with torch.no_grad():
                wanted = results_of(self._teacher(*inputs))
            given = results_of(self._model(*inputs))
        loss = torch.stack([_off(*one) for one in zip(given, wanted, self._variances, strict=True)]).mean()
        if not loss.requires_grad:
            raise ModelError("The model has no gradients", why="its results do not depend on its parameters")
        names = self._wanted.keys()
        layers = [_off(self._given[one], self._wanted[one], self._layer_variances[one]) for one in names]
        return loss + FEATURE_WEIGHT * torch.stack(layers).mean() if layers else loss

    @torch.no_grad()
    def error(self) -> float:
        """Of the results on the inputs that were held out, relative to their deviation in the original."""
        results = [results_of(self._model(*inputs)) for inputs in self._held_out]
        given = [torch.cat(parts) for parts in zip(*results, strict=True)]
        parts = [_off(*one) for one in zip(given, self._expected, self._variances, strict=True)]
        return float(torch.stack(parts).mean().sqrt())

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of all parameters, by name."""
        return {name: one.detach().clone().contiguous() for name, one in self._model.named_parameters()}

    def _prepared(self, inputs: Inputs) -> Inputs:
        cloned = (one.clone() if one.is_inference() else one for one in inputs)
        return tuple(_channels_last(one) if self._channels_last else one for one in cloned)


def _half_precision() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(HALF_FLAGS & (host_cpu().flags or frozenset())))


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


@torch.no_grad()
def _lay_out_channels_last(models: Sequence[nn.Module], inputs: Inputs) -> bool:
    """Lay out weights channels-last, in which images train faster; as they were where a model has views that fail."""
    try:
        for model in models:
            model.to(memory_format=torch.channels_last)
            model(*(_channels_last(one[:2]) for one in inputs))
    except RuntimeError:
        for model in models:
            model.to(memory_format=torch.contiguous_format)
        return False
    return True


def _watch(model: nn.Module, path: str, scale: torch.Tensor, seen: dict[str, torch.Tensor]) -> None:
    """From now on `seen` has what the layer of `model` at `path` gave last, scaled."""

    def hook(_module: nn.Module, _inputs: Any, result: torch.Tensor) -> None:
        seen[path] = result * scale.to(result.dtype).reshape(-1, *[1] * (result.dim() - 2))

    handle: Callable[..., Any] = model.get_submodule(path).register_forward_hook
    handle(hook)


def _variance(values: torch.Tensor, dim: int) -> float:
    """Around the means at each index of `dim`, over all others; 1 where there is none."""
    others = [one for one in range(values.dim()) if one != dim] if dim else [0]
    variance = float((values - values.mean(others, keepdim=True)).double().square().mean())
    return variance if variance > 0 else float(values.double().square().mean()) or 1.0


def _off(given: torch.Tensor, wanted: torch.Tensor, variance: float) -> torch.Tensor:
    return (given.float() - wanted.float()).square().mean() / variance
