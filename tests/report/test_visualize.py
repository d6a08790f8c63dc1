"""`sepc.visualize`: what it takes, what it writes, and what it says where something is missing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc.report.dot import draw
from sepc.report.visualize import GraphvizMissingError, render
from tests.helpers import passes_until
from tests.report.graphs import after_folding

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A convolution, a normalisation and an activation."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


@pytest.fixture(scope="module")
def compiled(model: nn.Module) -> sepc.CompiledModel:
    return sepc.compile(model, example_inputs=(X,), num_threads=1)


def test_each_subject_is_drawn(model: nn.Module, compiled: sepc.CompiledModel, tmp_path: Path) -> None:
    explanation = compiled.explain()
    texts = [
        sepc.visualize(subject, tmp_path / "deep" / "graph.dot", *inputs).read_text()
        for subject, inputs in [
            (model, (X,)),
            (compiled, ()),
            (explanation, ()),
            (torch.export.export(model, (X,)), (X,)),
        ]
    ]
    region = next(one for one in explanation.regions if one.kind == "convolution")
    for text in texts:
        assert f"{region.name}: convolution" in text
        assert "predicted" in text
        assert "measured" not in text
    captured = sepc.visualize(passes_until("promote", model, X)[0], tmp_path / "captured.dot").read_text()
    assert "batch_norm" in captured


def test_a_profile_is_shown(compiled: sepc.CompiledModel, tmp_path: Path) -> None:
    explanation = compiled.explain().with_profile(compiled.profile(X, repeats=2))
    assert "µs measured" in sepc.visualize(explanation, tmp_path / "graph.dot").read_text()


def test_the_graphs_around_a_pass_stand_side_by_side(compiled: sepc.CompiledModel, tmp_path: Path) -> None:
    text = sepc.visualize(compiled, tmp_path / "graph.dot", around="fold-batch-norm").read_text()
    assert 'label="before fold-batch-norm"' in text
    assert 'label="after fold-batch-norm"' in text
    assert "removed</td>" in text
    before, after = (passes_until(name, nn.Conv2d(3, 8, 3), X)[0] for name in ("canonicalize", "group"))
    assert "cluster_side_1" in sepc.visualize(after, tmp_path / "two.dot", before=before).read_text()


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_suffix_is_the_format(compiled: sepc.CompiledModel, tmp_path: Path, suffix: str, start: bytes) -> None:
    written = sepc.visualize(compiled, tmp_path / f"graph.{suffix}")
    assert written == tmp_path / f"graph.{suffix}"
    assert written.read_bytes().startswith(start)


def test_without_the_program_its_source_is_written_and_that_is_said(
    compiled: sepc.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING, "sepc.report"):
        written = sepc.visualize(compiled, tmp_path / "graph.svg")
    assert written == tmp_path / "graph.dot"
    assert written.read_text().startswith("digraph")
    assert "graph.dot, since Graphviz is not installed: install Graphviz" in caplog.text
    with pytest.raises(GraphvizMissingError, match="apt install graphviz"):
        render(draw(after_folding()), "svg")


def test_what_cannot_be_drawn_is_one_clear_error(
    compiled: sepc.CompiledModel, model: nn.Module, tmp_path: Path
) -> None:
    graph = passes_until("promote", model, X)[0]
    with pytest.raises(sepc.InputError, match=r"no format 'gif'[\s\S]*svg, png, pdf, dot"):
        sepc.visualize(compiled, tmp_path / "graph.gif")
    with pytest.raises(sepc.InputError, match="no inputs to compile"):
        sepc.visualize(model, tmp_path / "graph.svg")
    with pytest.raises(sepc.InputError, match="no picture of str"):
        sepc.visualize("model", tmp_path / "graph.svg")
    with pytest.raises(sepc.InputError, match=r"no pass 'fold-batch'[\s\S]*fold-batch-norm"):
        sepc.visualize(compiled, tmp_path / "graph.svg", around="fold-batch")
    with pytest.raises(sepc.InputError, match="'demote' changed nothing"):
        sepc.visualize(compiled, tmp_path / "graph.svg", around="demote")
    with pytest.raises(sepc.InputError, match="does not know its passes"):
        sepc.visualize(graph, tmp_path / "graph.svg", around="group")
    with pytest.raises(sepc.InputError, match="Only a graph"):
        sepc.visualize(compiled, tmp_path / "graph.svg", before=graph)
    assert not list(tmp_path.iterdir())
