"""Innermost loops are found in assembly, and analysed where there is an analyser."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import inner_loops
from benchmarks.inner_loops import Layer, analyse, innermost_loops

ASSEMBLY = """
main:
    mov x0, #0
.LBB0_1:
    ldr q0, [x1]
.LBB0_2:
    cmp x2, x3
    b.hs .LBB0_9
    fmla v1.4s, v0.4s, v2.s[0]
    fmla v3.4s, v0.4s, v2.s[1]
    str q9, [sp, #32]
    b .LBB0_2
.LBB0_3:
    fmla v1.4s, v0.4s, v2.4s
    b.ne .LBB0_3
    cbnz x0, .LBB0_1
.LBB0_9:
    ret
"""


def test_loops_with_none_inside_are_found() -> None:
    first, second = innermost_loops(ASSEMBLY)
    assert [line.split()[0] for line in first] == ["cmp", "fmla", "fmla", "str"]
    assert [line.split()[0] for line in second] == ["fmla"]


def test_the_layers_of_a_model_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    monkeypatch.setattr(inner_loops, "models", SimpleNamespace(load=lambda name: (model, (torch.randn(1, 3, 15, 15),))))
    assert {text: layer.kind for text, layer in inner_loops.layers_of("net").items()} == {
        "3×3 /2 dense 3 → 8, 15×15": "dense",
        "3×3 depthwise 8 → 8, 7×7": "depthwise",
        "1×1 pointwise 8 → 8, 5×5": "pointwise",
        "linear 8 → 5, 1 rows": "pointwise",
    }


# Continuous integration installs it.
needs_analyser = pytest.mark.skipif(
    not os.environ.get("CI") and inner_loops.find_analyser() is None, reason="needs llvm-mca of LLVM 16 or later"
)


@needs_analyser
def test_the_analyser_tells_a_chain_from_independent_multiply_adds() -> None:
    independent = [f"    fmla v{number}.4s, v30.4s, v31.4s" for number in range(12)]
    chain = ["    fmla v0.4s, v30.4s, v31.4s"] * 12
    assert analyse(independent, "cortex-a72").share > 0.95
    assert analyse(chain, "cortex-a72").share < 0.5
    assert analyse([*independent, "    str q9, [sp, #16]", "    ldr x1, [sp, #8]"], "cortex-a72").stack_accesses == 1
    layer = Layer("pointwise", "", nn.Conv2d(32, 64, 1), (1, 32, 20, 20))
    tiling, found = inner_loops.measure(layer, "arm64:cortex-a72")
    assert "registers" in tiling
    assert (found.share > 0.9, found.stack_accesses) == (True, 0)


def test_a_missing_analyser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner_loops.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no llvm-mca of LLVM 16 or later; install"):
        analyse(["    fmla v0.4s, v1.4s, v2.4s"], "cortex-a72")


@pytest.mark.parametrize(("version", "found"), [("14.0.6", False), ("19.1.7", True)])
def test_an_analyser_of_an_old_llvm_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, found: bool
) -> None:
    tool = tmp_path / "llvm-mca"
    tool.write_text(f"#!/bin/sh\necho 'Debian LLVM version {version}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (inner_loops.find_analyser() == str(tool)) is found


@needs_analyser
@pytest.mark.parametrize("target", inner_loops.TARGETS["float16"])
def test_a_pointwise_loop_in_float16_is_near_its_bound_and_keeps_to_registers(target: str) -> None:
    for channels in (64, 384):  # Short sums, and sums in blocks.
        layer = Layer("pointwise", "", nn.Conv2d(channels, 96, 1), (1, channels, 14, 14))
        _, found = inner_loops.measure(layer, target, "float16")
        assert (found.share > 0.9, found.stack_accesses) == (True, 0)
