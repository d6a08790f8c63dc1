"""`sepc.load`: files of saved models, and directories of exported ones, which need no PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sepc.errors import ArtifactError

if TYPE_CHECKING:
    from sepc.runtime.exported import ExportedModel
    from sepc.runtime.model import LoadedModel


def load(path: str | os.PathLike[str]) -> LoadedModel | ExportedModel:
    """The model that ``save`` wrote to the file `path`, or ``export`` with ``format="tvm"`` into that directory.

    TVM is not needed, and for a directory neither is PyTorch: its model takes and gives NumPy arrays. There is machine
    code in it, which cannot be checked: load only what you would run.

    Raises:
        ArtifactError: it is damaged, not of sepc, of another format, or for a processor that this host lacks.
    """
    place = Path(path)
    if place.is_dir():
        from sepc.runtime import exported

        return exported.load(place)
    try:
        from sepc.runtime import model
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ArtifactError(
            "A saved model cannot be loaded without PyTorch",
            where=str(place),
            why=str(error),
            fix='install torch, or export the model with format="tvm" and load that directory',
        ) from error
    return model.load(place)
