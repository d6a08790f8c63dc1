"""What is told of each region of a compiled model, from the graph that it came from."""

from __future__ import annotations

from torch import fx

from sepc.ir import region
from sepc.runtime.cuda import CudaExecutable
from sepc.runtime.executable import AnyExecutable
from sepc.runtime.gpu import Resources
from sepc.runtime.report import RegionReport


def region_report(node: fx.Node, graph: fx.GraphModule, executable: AnyExecutable) -> RegionReport:
    """What is told of the region that `node` calls, whose inside is `graph`."""
    info, choice = region.info(node), node.meta.get("sepc_tiling")
    names = tuple(str(inner.target).removeprefix("aten.") for inner in region.computations(graph))
    cost = choice.cost if choice is not None and info.kernel == "sepc" else None
    return RegionReport(
        name=node.name,
        kind=info.kind,
        ops=names,
        kernel=info.kernel,
        reason=info.reason,
        tiling=str(choice.tiling) if choice is not None and cost is not None else "",
        predicted_us=cost.time_us if cost is not None else 0.0,
        bottleneck=cost.bottleneck if cost is not None else "",
        bytes_moved=region.bytes_moved(node, graph),
        flops=cost.flops if cost is not None else 0,
        symbols=executable.program.symbols[node.name],
        resources=_resources(executable, node.name),
    )


def _resources(executable: AnyExecutable, region_name: str) -> tuple[Resources, ...]:
    """What the kernels of a region take, where that is known."""
    known = executable.resources if isinstance(executable, CudaExecutable) else {}
    return tuple(known[symbol] for symbol in executable.program.symbols[region_name] if symbol in known)
