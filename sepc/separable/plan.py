"""A plan: which layers of a model are replaced by which factors. It can be applied, saved and loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sepc.errors import ArtifactError, InputError
from sepc.separable.forms import FORMS
from sepc.separable.geometry import Geometry
from sepc.separable.layers import module_at

FORMAT: Final = "sepc-plan-3"


@dataclass(frozen=True)
class Replacement:
    """What takes the place of one convolution.

    Attributes:
        form: a name of `sepc.separable.forms`. rank: of that form, per group.
        factors: weights of its layers, in float32. bias: of the last one.
        error: the relative error of the layer's results that is to be expected, as a root of mean squares.
    """

    form: str
    rank: int
    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None
    error: float

    def build(self, geometry: Geometry) -> nn.Sequential:
        """The layers, with weights of their own, in the order of a file: by other strides PyTorch rounds otherwise."""
        bias = self.bias
        factors = tuple(factor.clone(memory_format=torch.contiguous_format) for factor in self.factors)
        return FORMS[self.form].build(geometry, self.rank, factors, None if bias is None else bias.clone())


@dataclass(frozen=True)
class Plan:
    """What makes a separated model of the original.

    Attributes:
        layers: replacements by the names of the modules whose place they take; the others stay.
        weights: parameters of those others that were fitted or trained since, by name.
    """

    layers: Mapping[str, Replacement] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of `model` with these layers replaced; raises InputError where they do not fit it."""
        result = copy.deepcopy(model)
        for path, replacement in self.layers.items():
            replace_module(result, path, replacement)
        own = dict(result.named_parameters())
        with torch.no_grad():
            for name, value in self.weights.items():
                if name not in own or own[name].shape != value.shape:
                    why = f"it has no parameter of shape {tuple(value.shape)} there"
                    fix = "apply the plan to the model that it was made for"
                    raise InputError("The plan does not fit the model", where=name, why=why, fix=fix)
                own[name].copy_(value)
        return result

    def with_weights(self, parameters: Mapping[str, torch.Tensor]) -> Plan:
        """The plan whose model has these parameters: all that the model of this one has, by name."""
        rest = dict(parameters)
        layers = {path: _with_weights(path, one, rest) for path, one in self.layers.items()}
        return Plan(layers, rest)

    def save(self, path: str | Path) -> None:
        """Write the plan to a file of safetensors, which holds tensors and text, and no code."""
        tensors = {f"{_WEIGHT}{name}": value for name, value in self.weights.items()}
        rows = {}
        for name, one in self.layers.items():
            rows[name] = {"form": one.form, "rank": one.rank, "error": one.error, "factors": len(one.factors)}
            tensors |= {_factor(name, index): factor for index, factor in enumerate(one.factors)}
            if one.bias is not None:
                tensors[_bias(name)] = one.bias
        # Copies, as no two tensors of such a file may share memory.
        copies = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
        save_file(copies, path, metadata={"format": FORMAT, "layers": json.dumps(rows)})

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from a file; raises ArtifactError if it holds none."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no mapping
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
            layers = {name: _replacement(name, row, tensors) for name, row in json.loads(about["layers"]).items()}
            own = {name.removeprefix(_WEIGHT): one for name, one in tensors.items() if name.startswith(_WEIGHT)}
            return Plan(layers, own)
        except FileNotFoundError:
            raise
        except _UNREADABLE as error:
            why = str(error).partition("\n")[0]
            raise ArtifactError("This file holds no plan", where=str(path), why=why) from error


_WEIGHT: Final = "weight:"
# What reading a file, and making a plan of what it holds, raise for files of something else.
_UNREADABLE: Final = (
    *(SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, MemoryError),
)


def _factor(layer: str, index: int) -> str:
    return f"factor {index}:{layer}"


def _bias(layer: str) -> str:
    return f"bias:{layer}"


def _replacement(layer: str, row: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Replacement:
    factors = tuple(tensors[_factor(layer, index)] for index in range(min(row["factors"], len(tensors))))
    if row["form"] not in FORMS or type(row["rank"]) is not int:
        raise ValueError(f"there is no form {row['form']!r} of rank {row['rank']!r}")
    return Replacement(row["form"], row["rank"], factors, tensors.get(_bias(layer)), float(row["error"]))


def _with_weights(path: str, replacement: Replacement, parameters: dict[str, torch.Tensor]) -> Replacement:
    """`replacement` with the parameters of its layers, which are taken out of `parameters`."""
    factors = tuple(parameters.pop(f"{path}.{index}.weight") for index in range(len(replacement.factors)))
    bias = parameters.pop(f"{path}.{len(factors) - 1}.bias", None)
    return replace(replacement, factors=factors, bias=bias)


def replace_module(model: nn.Module, path: str, replacement: Replacement) -> None:
    """Put `replacement` into `model` at `path`, in place; raises InputError where it does not fit."""
    try:
        layer = module_at(model, path)
    except LookupError as error:
        fix = "apply the plan to the model that it was made for"
        raise InputError("The plan does not fit the model", where=path, why=str(error), fix=fix) from error
    geometry = Geometry.of(layer)
    wanted = [one.weight_shape for one in FORMS[replacement.form].factors(geometry, replacement.rank)]
    if [tuple(one.shape) for one in replacement.factors] != wanted:
        why = f"its factors have shapes {_shapes(replacement.factors)}, and the layer wants {wanted}"
        raise InputError("The plan does not fit the model", where=path, why=why, fix="make a plan for this model")
    built = replacement.build(geometry).to(layer.weight.device, layer.weight.dtype).train(layer.training)
    built.requires_grad_(layer.weight.requires_grad)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, built)


def _shapes(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in tensors]
