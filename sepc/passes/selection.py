"""Passes by name, with options: ``fold-batch-norm,fuse{objective=memory}``."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any, ClassVar, get_args, get_type_hints

from sepc.cost_model.chain import Objective
from sepc.errors import InputError, require_known
from sepc.passes.manager import Pass
from sepc.passes.pipeline import PIPELINE
from sepc.passes.registry import pass_class

_ITEM = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\{(?P<options>[^{}]*)\})?\s*(?:,|$)")
_WORDS = {"true": True, "false": False}


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
    # As it stands in the pipeline, which may set options of its own.
    made: Any = next((one for one in PIPELINE if one.name == name), None) or kind()
    known = [one.name for one in dataclasses.fields(made)]
    names = vars(sys.modules[kind.__module__]) | {"ClassVar": ClassVar, "Objective": Objective}
    types, given = get_type_hints(kind, names), {}
    for option in options.split():
        key, equals, value = option.partition("=")
        require_known(key, known, f"option of {name}")
        if not equals:
            raise InputError(f"Option '{key}' of {name} has no value", fix=f"write {name}{{{key}=VALUE}}")
        if choices := get_args(types[key]):
            require_known(value, choices, f"{key} of {name}")
        given[key] = _value(value, types[key], f"{name}{{{option}}}")
    chosen: Pass = dataclasses.replace(made, **given)
    return chosen


def _value(text: str, kind: object, where: str) -> object:
    """An option's value as its field's type has it; raises InputError."""
    if kind is bool and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if kind not in (bool, int, float):
        return text
    try:
        return int(text) if kind is int else float(text) if kind is float else _WORDS[text]
    except (ValueError, KeyError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise InputError(f"'{text}' is not {wanted}", where=where, fix=f"write {wanted}") from error
