"""What is left to PyTorch: also where a kernel is no good; told in the log, or an error where that is not wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sepc.errors import KernelError, ModelError
from sepc.ir import region
from sepc.ir.origin import origin_of
from sepc.target import Target

if TYPE_CHECKING:
    from torch import fx

    from sepc._compile import Compiled
    from sepc.runtime.program import Program

logger = logging.getLogger(__name__)

MOST_TOLD: Final = 5
"""How many operators an error lists."""


def require_kernels(compiled: Compiled, target: Target, fullgraph: bool, runs_here: bool) -> None:
    """Tell what PyTorch runs of `compiled`; `runs_here` says whether that is this host's PyTorch.

    Raises ModelError, with every such operator, if there is any and `fullgraph` is set, or if it runs elsewhere.
    """
    regions = compiled.description.regions
    fallbacks = [one for one in regions if one.kernel == "torch"]
    if not fallbacks:
        return
    if not fullgraph and runs_here:
        reasons = "; ".join(dict.fromkeys(f"{', '.join(one.ops)} ({one.reason})" for one in fallbacks))
        logger.info("%d of %d regions run in PyTorch: %s", len(fallbacks), len(regions), reasons)
        return
    # The graph of this compilation, not of that which the cache has it from: source lines are those of this program.
    lines = _lines(compiled.lowered.graph_module)
    count = sum(map(len, lines.values()))
    more = f"and {len(lines) - MOST_TOLD} more, which sepc.explain(model, ...) tells" if len(lines) > MOST_TOLD else ""
    told = [f"{words}: {', '.join(dict.fromkeys(places))}" for words, places in [*lines.items()][:MOST_TOLD]]
    wanted = "fullgraph=True" if fullgraph else _elsewhere(target)
    raise ModelError(
        f"There {'is no kernel for 1 operator' if count == 1 else f'are no kernels for {count} operators'}",
        where="\n    ".join(filter(None, (*told, more))),
        why=f"PyTorch would run {'it' if count == 1 else 'them'}, and {wanted} leaves nothing to PyTorch",
        fix=_fix(fullgraph, runs_here),
    )


def _elsewhere(target: Target) -> str:
    """Where it runs, if not on this host."""
    return "a device" if target.is_runnable else f"the target {target.name!r}, which this host cannot run,"


def _fix(fullgraph: bool, runs_here: bool) -> str:
    ways = ["rewrite these lines with other operators"]
    ways += [] if runs_here else ["compile for this host"]
    ways += ["leave out fullgraph=True"] if fullgraph else []
    return f"{ways[0]}, or {' and '.join(ways[1:])}"


def _lines(graph_module: fx.GraphModule) -> dict[str, list[str]]:
    """What PyTorch runs: operators with the reason, and the places in the user's program of each."""
    lines: dict[str, list[str]] = {}
    for node, graph in region.regions(graph_module):
        info = region.info(node)
        if info.kernel == "torch":
            for inner in region.computations(graph):
                source = origin_of(inner).source or origin_of(node).source or "an unknown place"
                # Reasons say which operator it is, too, since a region may have several.
                reason = info.reason.replace(f"{inner.target} ", "").replace(f" for {inner.target}", "")
                lines.setdefault(f"{inner.target} ({reason})", []).append(source)
    return lines


def unbuilt_regions(program: Program, error: KernelError) -> dict[str, str]:
    """The regions whose kernels could not be compiled, with the reasons; raises `error` again if that is all of them.

    Then it is the compiler that does not work, and not a kernel.
    """
    own = {name: symbols for name, symbols in program.symbols.items() if symbols}
    failed = {name: [error.reasons[one] for one in symbols if one in error.reasons] for name, symbols in own.items()}
    if all(failed.values()):
        raise error
    return {name: f"its kernel could not be compiled: {why[0]}" for name, why in failed.items() if why}


def hand_over(graph_module: fx.GraphModule, reasons: Mapping[str, str]) -> None:
    """Mark these regions as PyTorch's, and say so in the log."""
    for node, _ in region.regions(graph_module):
        if node.name in reasons:
            node.meta["sepc_region"] = replace(region.info(node), kernel="torch", reason=reasons[node.name])
            logger.warning("%s runs in PyTorch: %s", node.name, reasons[node.name])
