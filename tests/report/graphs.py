"""Graphs that the tests of pictures draw."""

from __future__ import annotations

from collections.abc import Sequence

from sepc.report.snapshot import DrawnNode, DrawnRegion, Snapshot

SOURCE = "/home/user/net.py"


def node(
    key: str, title: str, *inputs: str, type_: str = "1×8×4×4", line: int = 0, constants: Sequence[str] = ()
) -> DrawnNode:
    """An operator, in the region that its key names before a slash."""
    region, _, name = key.rpartition("/")
    source = f"{SOURCE}:{line}" if line else ""
    return DrawnNode(key, name, title, "operator", type_, tuple(constants), inputs, region, source, "frontend")


def before_folding() -> Snapshot:
    """A convolution, a normalisation and an activation."""
    x = DrawnNode("x", "x", "x", "input", "1×3×4×4")
    nodes = [
        node("conv2d", "conv2d", "x", line=3, constants=["8×3×1×1"]),
        node("batch_norm", "batch_norm", "conv2d", line=4, constants=["8", "8", "8", "8"]),
        node("relu", "relu", "batch_norm", line=4),
    ]
    return Snapshot(
        "before fold", (x, *nodes, DrawnNode("output", "output", "output", "output", "", inputs=("relu",))), {}
    )


def after_folding() -> Snapshot:
    """The same with the normalisation in the weights, as a region with figures."""
    x = DrawnNode("x", "x", "x", "input", "1×3×4×4")
    nodes = [
        node("region_0/conv2d_1", "conv2d", "x", line=3, constants=["8×3×1×1", "8"]),
        node("region_0/relu", "relu", "region_0/conv2d_1", line=4),
    ]
    end = DrawnNode("output", "output", "output", "output", "", inputs=("region_0/relu",))
    region = DrawnRegion("region_0", "convolution", "sepc", "", "task 4 rows", 1.5, 1.75, "L2", 12_000, 3_000)
    return Snapshot("after fold", (x, *nodes, end), {"region_0": region})


def blocks(count: int, in_regions: bool = False) -> Snapshot:
    """A network of `count` equal residual blocks of three operators."""
    nodes, last, regions = [DrawnNode("x", "x", "x", "input", "1×8×4×4")], "x", dict[str, DrawnRegion]()
    for index in range(count):
        at = f"region_{index}/" if in_regions else ""
        nodes += [
            node(f"{at}conv_{index}", "conv2d", last, constants=["8×8×3×3"]),
            node(f"{at}relu_{index}", "relu", f"{at}conv_{index}"),
            node(f"{at}add_{index}", "add", f"{at}relu_{index}", last),
        ]
        last = f"{at}add_{index}"
        if in_regions:
            regions[f"region_{index}"] = DrawnRegion(f"region_{index}", "convolution", "sepc", predicted_us=10.0)
    nodes.append(DrawnNode("output", "output", "output", "output", "", inputs=(last,)))
    return Snapshot("blocks", tuple(nodes), regions)


def without_repetition(count: int) -> Snapshot:
    """A network of `count` operators, each of another size, with a skip over every third."""
    nodes = [DrawnNode("x", "x", "x", "input", "1")]
    for index in range(count):
        inputs = (nodes[-1].key, *([nodes[-4].key] if index % 3 == 0 and index > 3 else []))
        nodes.append(node(f"op_{index}", "conv2d", *inputs, type_=f"1×{index}"))
    return Snapshot("different", tuple(nodes), {})
