"""All passes by name: those of the pipeline, and those that installed packages add by entry points of `GROUP`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final

from sepc.errors import InputError, require_known
from sepc.passes.pipeline import PASSES

if TYPE_CHECKING:
    from sepc.passes.manager import Pass

GROUP: Final = "sepc.passes"


def added() -> Mapping[str, EntryPoint]:
    """The passes of other packages, by name, not loaded yet; raises InputError for a name that is taken."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in PASSES or found.get(point.name, point) != point:
            raise InputError(
                f"There are two passes '{point.name}'",
                where=_where(point),
                why="a name stands for one pass",
                fix="give the entry point another name, or uninstall one of the packages",
            )
        found[point.name] = point
    return found


def names() -> tuple[str, ...]:
    """Names of all passes: those of the pipeline in its order, then the others."""
    return (*PASSES, *sorted(added()))


def pass_class(name: str) -> type[Pass]:
    """The class of the pass of that name; raises InputError if there is none, or what there is makes no pass."""
    others = added()
    require_known(name, [*PASSES, *others], "pass")
    return PASSES[name] if name in PASSES else _load(others[name])


def _load(point: EntryPoint) -> type[Pass]:
    what = f"The pass '{point.name}' cannot be used"
    try:
        made: Any = point.load()
    except Exception as error:  # It is somebody else's module, which may fail at anything.
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(what, where=_where(point), why=why, fix="mend or uninstall the package") from error
    if not (isinstance(made, type) and dataclasses.is_dataclass(made) and callable(getattr(made, "run", None))):
        raise InputError(what, where=_where(point), why="it is no dataclass with a method `run`")
    if getattr(made, "name", None) != point.name:
        why = f"its `name` is {getattr(made, 'name', None)!r}"
        raise InputError(what, where=_where(point), why=why, fix="have class and entry point say the same name")
    kind: Any = made
    found: type[Pass] = kind
    return found


def _where(point: EntryPoint) -> str:
    package = f" of package {point.dist.name}" if point.dist else ""
    return f"entry point {point.value}{package}"
