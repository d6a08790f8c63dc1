"""Models as the command line names them: a file of torch.export, a zoo's name, or a function in a Python file."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sepc.cli import MODEL_FORMS
from sepc.errors import InputError, ModelError, did_you_mean
from sepc.frontend.quiet import quiet
from sepc.runtime.signature import Signature, dense, flatten

IMAGE = (1, 3, 224, 224)
_INPUT = re.compile(r"(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class Given:
    """A model in eval mode, and the inputs to compile it for: arguments by position, and by name."""

    model: nn.Module | ExportedProgram
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        """The call of the model with its inputs."""
        leaves, spec = flatten(self.inputs, self.kwargs)
        return Signature.of(spec, [dense(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])


def load(text: str, inputs: Sequence[str] = ()) -> Given:
    """The model that `text` names, with random `inputs` of the given types, else those that come with the model.

    Args:
        text: one of `sepc.cli.MODEL_FORMS`.
        inputs: as ``1x3x224x224``, or ``1x16:int64``.

    Raises:
        InputError: `text` names no model, or one of the inputs is no shape. ModelError: the model cannot be made.
    """
    scheme, _, name = text.partition(":")
    given = tuple(parse_input(one) for one in inputs)
    if text.endswith(".pt2"):
        return _exported(Path(text), given)
    if scheme == "timm" and name:
        return _from_timm(name, given)
    if scheme == "torchvision" and name:
        return _from_torchvision(name, given)
    path, _, function = text.rpartition(":")
    if path.endswith(".py") and function:
        return _from_file(Path(path), function, given)
    raise InputError(f"'{text}' names no model", where="MODEL", fix=f"give {MODEL_FORMS}")


def parse_input(text: str) -> torch.Tensor:
    """A random tensor of the type that `text` describes, the same each time; raises InputError."""
    match = _INPUT.fullmatch(text)
    dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        why = f"there is no type '{match['dtype']}'" if match else ""
        raise InputError(f"'{text}' is no input", where="--input", why=why, fix="write 1x3x224x224 or 1x16:int64")
    shape = tuple(map(int, match["shape"].split("x")))
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _exported(path: Path, given: tuple[torch.Tensor, ...]) -> Given:
    try:
        with quiet("torch.export"):
            program = torch.export.load(path)
    except Exception as error:  # PyTorch's reader lets through whatever a damaged file makes it stumble over.
        why = str(error).partition("\n")[0]
        raise ModelError("The exported program cannot be read", where=str(path), why=why) from error
    if given:
        return Given(program, given)
    if program.example_inputs is None:
        raise InputError("The exported program has no example inputs", where=str(path), fix="give them with --input")
    args, kwargs = program.example_inputs
    return Given(program, tuple(args), kwargs)


def _from_timm(name: str, given: tuple[torch.Tensor, ...]) -> Given:
    timm: Any = _package("timm")
    _require_model(name.partition(".")[0], "timm", timm.list_models())
    try:
        model = timm.create_model(name).eval()
    except RuntimeError as error:  # Its training, named behind the point, may be unknown.
        raise ModelError(f"timm cannot make '{name}'", why=str(error).partition("\n")[0]) from error
    config = getattr(model, "pretrained_cfg", {})
    return Given(model, given or (parse_input("x".join(map(str, (1, *config.get("input_size", IMAGE[1:]))))),))


def _from_torchvision(name: str, given: tuple[torch.Tensor, ...]) -> Given:
    torchvision: Any = _package("torchvision")
    _require_model(name, "torchvision", torchvision.models.list_models())
    model = torchvision.models.get_model(name, weights=None).eval()
    return Given(model, given or (parse_input("x".join(map(str, IMAGE))),))


def _from_file(path: Path, function: str, given: tuple[torch.Tensor, ...]) -> Given:
    where = f"{path}:{function}"
    # No module that is imported anywhere has this name, whatever the file is called.
    spec = importlib.util.spec_from_file_location(f"sepc_opt.{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError("There is no such Python file", where=where, fix="check the path")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and torch.export look a class's module up.
    sys.modules[module.__name__] = module
    with _explained("The file cannot be imported", path):
        spec.loader.exec_module(module)
    maker = getattr(module, function, None)
    if not callable(maker):
        raise InputError(
            f"The file has no function '{function}'", where=where, fix="name a function that takes nothing"
        )
    with _explained("The function makes no model", path):
        made: Any = maker()
    model, inputs = (made[0], tuple(made[1:])) if isinstance(made, tuple) else (made, ())
    if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
        inputs = tuple(inputs[0])
    if not isinstance(model, nn.Module | ExportedProgram):
        why = f"it returns {type(model).__name__}"
        raise InputError("The function makes no model", where=where, why=why, fix="return it, or (it, inputs)")
    if not (given or inputs):
        raise InputError("The model has no inputs", where=where, fix="return (model, inputs), or give --input")
    return Given(model.eval() if isinstance(model, nn.Module) else model, given or inputs)


@contextmanager
def _explained(what: str, path: Path) -> Iterator[None]:
    """Whatever the user's own program raises, as a ModelError with its line."""
    try:
        yield
    except Exception as error:
        frames = [one for one in traceback.extract_tb(error.__traceback__) if Path(one.filename) == path.absolute()]
        where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else str(path)
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": ")
        raise ModelError(what, where=where, why=why, fix="make it work in Python first") from error


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"{name} cannot be imported", why=str(error), fix=f"pip install {name}") from error


def _require_model(name: str, package: str, known: Sequence[str]) -> None:
    if name not in known:  # They are hundreds, too many to list.
        raise InputError(
            f"There is no model '{name}' of {package}", where=f"MODEL {package}:{name}", fix=did_you_mean(name, known)
        )
