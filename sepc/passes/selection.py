"""Passes by name, with options: ``fold-batch-norm,fuse{objective=memory}``."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast, get_args, get_origin, get_type_hints

from sepc.cost_model.chain import Objective
from sepc.errors import InputError, require_known
from sepc.passes.manager import Pass
from sepc.passes.pipeline import PIPELINE
from sepc.passes.registry import pass_class

_ITEM = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\{(?P<options>[^{}]*)\})?\s*(?:,|$)")
_READERS: Mapping[object, tuple[Callable[[str], object], str]] = {
    str: (str, "a text"),
    bool: ({"true": True, "false": False}.__getitem__, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}
"""By the type of an option: what reads it, and what that wants."""


def parse_passes(text: str) -> tuple[Pass, ...]:
    """The passes that `text` names, in its order.

    Raises:
        InputError: there is no such pass or option, or the text is no list of passes.
    """
    passes: list[Pass] = []
    position = 0
    while position < len(text):
        item = _ITEM.match(text, position)
        if item is None:
            raise InputError(
                f"{text[position:]!r} is no list of passes",
                where=f"passes={text!r}",
                fix="separate names by commas, with options in braces: fuse{objective=memory}",
            )
        passes.append(make_pass(item["name"], item["options"] or ""))
        position = item.end()
    return tuple(passes)


def make_pass(name: str, options: str = "") -> Pass:
    """The pass of that name with `options`, written as ``key=value`` and separated by spaces; raises InputError."""
    kind: Any = pass_class(name)
    fields = {one.name: one for one in dataclasses.fields(kind)}
    names = vars(sys.modules[kind.__module__]) | {"ClassVar": ClassVar, "Objective": Objective}
    types, given = get_type_hints(kind, names), {}
    for option in options.split():
        key, equals, value = option.partition("=")
        require_known(key, fields, f"option of {name}")
        if not equals:
            raise InputError(f"Option '{key}' of {name} has no value", fix=f"write {name}{{{key}=VALUE}}")
        given[key] = _value(value, types[key], f"{name}{{{option}}}")
    placed = _placed(name)
    if placed is None:
        for key, one in fields.items():
            if key not in given and one.default is one.default_factory is dataclasses.MISSING:
                raise InputError(f"Option '{key}' of {name} is not given", fix=f"write {name}{{{key}=VALUE}}")
    chosen: Pass = dataclasses.replace(placed, **given) if placed is not None else kind(**given)
    return chosen


def pass_text(one: Pass) -> str:
    """What `make_pass` makes `one` of: its name, with the options that are not as they are by default."""
    placed, options, made = _placed(one.name), [], cast("Any", one)
    for option in dataclasses.fields(made):
        value = getattr(made, option.name)
        if value != (option.default if placed is None else getattr(placed, option.name)):
            options.append(f"{option.name}={str(value).lower() if isinstance(value, bool) else value}")
    return f"{one.name}{{{' '.join(options)}}}" if options else one.name


def _placed(name: str) -> Any:
    """The pass of that name as it stands in the pipeline, which may set options of its own; None if it is not there."""
    return next((one for one in PIPELINE if one.name == name), None)


def _value(text: str, kind: object, where: str) -> object:
    """An option's value as its field's type has it; raises InputError."""
    if get_origin(kind) is Literal:
        require_known(text, get_args(kind), "value", where)
        return text
    if kind not in _READERS:
        raise InputError(f"This option cannot be given as text, for it is of type {kind}", where=where)
    read, wanted = _READERS[kind]
    try:
        return read(text)
    except (ValueError, KeyError) as error:
        raise InputError(f"'{text}' is not {wanted}", where=where, fix=f"write {wanted}") from error
