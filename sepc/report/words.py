"""Numbers, types and names as the reports write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import torch


def shape_text(value: object) -> str:
    """A tensor's shape such as ``1×32×112×112``, with its type unless that is float32; empty for anything else."""
    if not isinstance(value, torch.Tensor):
        return ""
    text = "×".join(map(str, value.shape)) or "scalar"
    return text if value.dtype == torch.float32 else f"{text} {str(value.dtype).removeprefix('torch.')}"


def op_name(target: object) -> str:
    """Short name of what a node calls: ``conv2d`` for ``torch.ops.aten.conv2d.default``."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return str(getattr(target, "__name__", target))


def short_op(op: str) -> str:
    """An operator without its overload: ``conv2d`` for ``conv2d.default`` or ``aten.conv2d.default``."""
    return op.removeprefix("aten.").split(".")[0]


def bytes_text(count: float) -> str:
    """A number of bytes with a unit that suits it."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def flops_text(count: float) -> str:
    """A number of operations with a prefix that suits it."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {prefix}"
    return f"{count:.0f}"


def time_text(time_us: float) -> str:
    """A time with a unit that suits it."""
    return f"{time_us / 1e3:.3g} ms" if time_us >= 1e3 else f"{time_us:.1f} µs"


def percent(part: float, whole: float) -> str:
    """A share; a dash where there is nothing to share."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def short_source(source: str) -> str:
    """A line of the user's program, of whose path the last two parts are shown."""
    path, _, line = source.rpartition(":")
    return f"{'/'.join(PurePath(path).parts[-2:])}:{line}"


def short_sources(sources: Sequence[str]) -> str:
    """Lines of the user's program, by file, of whose path the last two parts are shown."""
    pairs = [source.rpartition(":")[::2] for source in sources]
    files = {file: list[str]() for file, _ in pairs}
    for file, line in pairs:
        files[file].append(line)
    return "; ".join(short_source(f"{file}:{', '.join(lines)}") for file, lines in files.items())
