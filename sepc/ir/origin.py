"""Where a node comes from: the pass that made it, the nodes it replaced, and the user's source line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Origin:
    """Provenance of a node, kept in ``node.meta["sepc_origin"]``.

    Attributes:
        pass_name: the pass that created the node; ``"frontend"`` for captured nodes.
        nodes: names of the nodes it was made from.
        source: the user's source line as ``file:line``; empty where it is not known.
    """

    pass_name: str
    nodes: tuple[str, ...] = ()
    source: str = ""


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# Of generated code there are frames, too, such as `<eval_with_key>.1`.
_LIBRARY_PATHS = ("/torch/nn/", "/torch/_", "/torch/fx/", "/torch/export/", "<")


def source_line(stack_trace: str | None) -> str:
    """The innermost frame of `stack_trace` that is not torch's own code, as ``file:line``; empty if there is none."""
    frames = _FRAME.findall(stack_trace or "")
    own = [frame for frame in frames if not any(part in frame[0] for part in _LIBRARY_PATHS)]
    return "{}:{}".format(*(own or frames)[-1]) if frames else ""


def origin_of(node: fx.Node) -> Origin:
    """The origin of `node`; for a node not yet annotated, one derived from its stack trace."""
    found = node.meta.get("sepc_origin")
    if isinstance(found, Origin):
        return found
    return Origin("frontend", (node.name,), source_line(node.stack_trace))


def derive(pass_name: str, nodes: Iterable[fx.Node]) -> Origin:
    """The origin of a node that pass `pass_name` makes from `nodes`: its source line is that of the first one known."""
    nodes = tuple(nodes)
    source = next((origin.source for origin in map(origin_of, nodes) if origin.source), "")
    return Origin(pass_name, tuple(node.name for node in nodes), source)
