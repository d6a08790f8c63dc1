"""What is left to PyTorch is told, and refused where that is asked for or cannot be."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc import cache_key as keys
from sepc.target import Target

X = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Two operators that have no kernels, and some that do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x).cumprod(1)  # the products
        return y.topk(3).values + 1  # the largest


def line(comment: str) -> str:
    """The place of the line with that comment."""
    lines = Path(__file__).read_text().splitlines()
    return f"{Path(__file__).name}:{next(number for number, text in enumerate(lines, 1) if text.endswith(comment))}"


def test_one_line_of_the_log_tells_what_runs_in_pytorch_and_why(caplog: pytest.LogCaptureFixture) -> None:
    compiled = sepc.compile(Mixed().eval())
    with caplog.at_level(logging.INFO, "sepc"):
        compiled(X)
        compiled(X)
    (message,) = (record.getMessage() for record in caplog.records if "PyTorch" in record.getMessage())
    regions = compiled.regions
    assert message.startswith(f"{sum(one.kernel == 'torch' for one in regions)} of {len(regions)} regions run in")
    assert "cumprod.default (no stage for aten.cumprod.default)" in message
    assert "topk.default (aten.topk.default has several results)" in message


def test_nothing_is_told_where_everything_has_a_kernel(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sepc"):
        sepc.compile(nn.Conv2d(3, 4, 3).eval(), fullgraph=True, example_inputs=(torch.randn(1, 3, 8, 8),))
    assert not [record for record in caplog.records if "PyTorch" in record.getMessage()]


def test_fullgraph_names_every_operator_with_its_line_and_reason() -> None:
    with pytest.raises(sepc.ModelError, match="no kernels for 2 operators") as caught:
        sepc.compile(Mixed().eval(), fullgraph=True)(X)
    assert f"aten.cumprod.default (no stage): {Path(__file__).parent}/{line('# the products')}" in caught.value.where
    assert (
        f"aten.topk.default (has several results): {Path(__file__).parent}/{line('# the largest')}"
        in caught.value.where
    )
    assert "and fullgraph=True leaves nothing to PyTorch" in caught.value.why
    assert caught.value.fix.endswith(", or leave out fullgraph=True")


def test_a_model_that_failed_fullgraph_stays_usable_for_other_shapes() -> None:
    class Tall(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.topk(3).values if x.shape[0] > 2 else torch.relu(x)

    compiled = sepc.compile(Tall().eval(), fullgraph=True)
    for _ in range(2):  # It is not remembered as compiled.
        with pytest.raises(sepc.ModelError, match="topk"):
            compiled(torch.randn(4, 8))
    x = torch.randn(2, 8)
    assert torch.equal(compiled(x), torch.relu(x))


def test_what_comes_from_the_cache_is_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEPC_CACHE", "1")
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sepc.cache.read_sources_digest", lambda: keys.SOURCES_DIGEST)
    torch.testing.assert_close(sepc.compile(Mixed().eval())(X), Mixed()(X))
    for _ in range(2):
        with pytest.raises(sepc.ModelError, match=rf"cumprod.default \(no stage\): .*{line('# the products')}"):
            sepc.compile(Mixed().eval(), fullgraph=True, example_inputs=(X,))
    assert list(sepc.compile(Mixed().eval(), example_inputs=(X,)).compile_times) == ["capture", "cache"]


def test_a_target_of_other_hosts_leaves_nothing_to_this_ones_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "missing_features", lambda self, host=None: ("avx512f",))
    with pytest.raises(sepc.ModelError, match="'x86-64-v4', which this host cannot run") as caught:
        sepc.compile(Mixed().eval(), target="x86-64-v4", example_inputs=(X,))
    assert "topk" in caught.value.where
    assert caught.value.fix.endswith(", or compile for this host")
    sepc.compile(nn.ReLU().eval(), target="x86-64-v4", example_inputs=(X,))
