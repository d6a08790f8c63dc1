"""What torch.export raises, told by the user's source line, or by the layer at fault, with a short reason."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.export import ExportedProgram

from sepc.errors import ModelError, SepcError
from sepc.frontend.quiet import quiet
from sepc.ir.origin import source_line
from sepc.progress import waiting

if TYPE_CHECKING:
    from collections.abc import Callable

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
_TOO_LONG = 300


def guarded(export: Callable[[], ExportedProgram], model: nn.Module | None = None) -> ExportedProgram:
    """What `export` makes, of `model` if it is known.

    Raises ModelError in place of all that torch.export raises.
    """
    try:
        # Without gradients: with them, a `torch.no_grad()` inside the model would become a nested graph.
        with waiting("torch.export"), quiet("torch.fx.experimental"), torch.no_grad():
            return export()
    except SepcError:
        raise
    except Exception as error:
        raise _explain(error, model) from error


def _explain(error: Exception, model: nn.Module | None) -> ModelError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2])[:_TOO_LONG] if lines else type(error).__name__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = _own_line(error) or _layer(frames, model) or source_line(str(error))
    fix = "rewrite that line so that torch.export can trace it, or compile the part of the model without it"
    if "data-dependent" in reason:  # What PyTorch says of it names symbols of its own.
        reason = "a branch of Python code, or a shape, depends on values inside a tensor, which only a run tells"
        fix = 'choose by torch.where, or use torch.compile(model, backend="sepc"), which leaves that line to Python'
    elif type(error) in (RuntimeError, ValueError, TypeError):  # What operators raise, with and without torch.export.
        fix = f"if the model without sepc fails for these inputs, too, mend either; else {fix}"
    return ModelError("torch.export cannot trace the model", where=where, why=reason, fix=fix)


def _own_line(error: Exception) -> str:
    """The innermost line that is the user's; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""


def _layer(frames: list[FrameType], model: nn.Module | None) -> str:
    """The innermost layer of `model` that was computed; empty if none was."""
    names = {} if model is None else {id(module): name for name, module in model.named_modules()}
    layers = [one for one in (frame.f_locals.get("self") for frame in frames) if names.get(id(one))]
    return f"layer {names[id(layers[-1])]!r}, {layers[-1]}".splitlines()[0] if layers else ""
