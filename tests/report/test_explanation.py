"""What an explanation tells: who computes what and why, totals, decisions; as text, as data and as a page."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import sepc
from sepc import cache_key as keys
from sepc.passes import fuse, gather_means
from sepc.report.explanation_text import WIDTH
from sepc.target import Target
from tests.helpers import Function
from tests.report import mixed
from tests.report.mixed import Mixed, X


def line(comment: str) -> str:
    """The place of the line with that comment, in the model."""
    lines = Path(mixed.__file__).read_text().splitlines()
    return (
        f"{Path(mixed.__file__).name}:{next(number for number, text in enumerate(lines, 1) if text.endswith(comment))}"
    )


# ---- what it holds


def test_who_computes_what(explanation: sepc.Explanation) -> None:
    kinds = Counter((one.kernel, one.kind) for one in explanation.regions if one.kind != "copy")
    assert kinds == {("sepc", "convolution"): 2, ("torch", "other"): 1, ("tvm", "other"): 1}
    assert (explanation.model, explanation.target, explanation.threads) == ("Mixed", "x86-64-v3", 1)


def test_flops_are_counted_alike_whoever_computes_them(explanation: sepc.Explanation) -> None:
    assert explanation.by_kernel["sepc"].flops == 2 * 256 * 8 * (27 + 9)
    assert explanation.by_kernel["torch"].flops == 2 * 8 * 8 * 256
    assert explanation.by_kernel["tvm"].flops == 0
    assert explanation.by_kernel["tvm"].bytes_moved == 2 * 4 * 64


def test_totals_add_up(explanation: sepc.Explanation) -> None:
    parts = explanation.by_kernel.values()
    for name in ("regions", "flops", "bytes_moved", "predicted_us"):
        assert sum(getattr(part, name) for part in parts) == pytest.approx(getattr(explanation.total, name))
    assert explanation.total.regions == len(explanation.regions)
    assert explanation.by_kernel["torch"].predicted_us == explanation.by_kernel["tvm"].predicted_us == 0
    assert sum(explanation.us_by_bottleneck.values()) == pytest.approx(explanation.total.predicted_us)
    assert explanation.total.predicted_us > 0


def test_a_kernel_of_ours_has_its_tiling_time_and_bytes(explanation: sepc.Explanation) -> None:
    first = next(one for one in explanation.regions if one.kind == "convolution")
    assert "registers" in first.tiling
    assert first.predicted_us >= first.compute_us > 0
    assert first.bottleneck in ("compute", *first.bytes_per_level)
    assert first.bytes_moved == 4 * (3 * 256 + 8 * 27 + 8 + 8 * 256)
    assert not first.reason
    assert [source.rpartition("/")[2] for source in first.sources] == [line("# the convolutions")]


def test_a_fallback_shows_its_operator_the_reason_and_the_users_line(explanation: sepc.Explanation) -> None:
    (fallback,) = (one for one in explanation.regions if one.kernel == "torch")
    assert fallback.ops == ("baddbmm.default",)
    assert fallback.reason == "no stage for aten.baddbmm.default"
    assert [source.rpartition("/")[2] for source in fallback.sources] == [line("# the product")]
    assert not fallback.bytes_per_level
    text = str(explanation)
    assert "not a kernel of ours: no stage for aten.baddbmm.default" in text
    assert line("# the product") in text


def test_bytes_of_a_region_with_two_results_count_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def squeeze_and_excite(self: Function, x: torch.Tensor) -> torch.Tensor:
        y = self.depth(x).relu()
        return y * y.mean((2, 3), keepdim=True)

    monkeypatch.setattr(fuse, "piece_time_us", lambda links, *_: float(len(links) ** 2))
    monkeypatch.setattr(gather_means, "_times_us", lambda problems, pools, context: (2.0, 1.0))
    model = Function(squeeze_and_excite, depth=nn.Conv2d(8, 8, 3, 1, 1, groups=8)).eval()
    regions = sepc.explain(model, torch.randn(2, 8, 12, 10)).regions
    (gathering,) = (one for one in regions if one.ops[-1] == "mean.dim" and len(one.ops) > 1)
    assert gathering.bytes_moved == 4 * (2 * 1920 + 192 + 72 + 8)


# ---- decisions


def test_a_rejected_fusion_has_its_reason_and_what_it_would_lose(explanation: sepc.Explanation) -> None:
    (note,) = (one for one in explanation.decisions if one.pass_name == "fuse")
    assert (note.taken, note.message) == (False, "not fused: no gain")
    assert (note.before_us, note.after_us, note.gain_us) == (2.0, 4.0, -2.0)
    assert len(note.nodes) == 2
    assert "fuse: 0 taken, 1 not" in str(explanation)


def test_a_fusion_that_is_taken_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "piece_time_us", lambda links, *_: 1.5)
    found = sepc.explain(Mixed().eval(), X)
    (note,) = (one for one in found.decisions if one.pass_name == "fuse")
    assert (note.taken, note.gain_us) == (True, 1.5)
    (chain,) = (one for one in found.regions if one.kind == "chain")
    assert note.message == f"one kernel, {chain.name}"
    assert chain.flops == 2 * 256 * 8 * (27 + 9)
    assert chain.ops[0] == chain.ops[-1] == "conv2d.default"


def test_a_rewrite_that_is_taken_is_told_with_the_line(explanation: sepc.Explanation) -> None:
    (note,) = (one for one in explanation.decisions if one.pass_name == "fold-batch-norm")
    assert (note.taken, note.message, note.gain_us) == (True, "folded into the weights before it", None)
    assert note.source.endswith(line("# the convolutions"))


# ---- how it is shown


def test_the_text_tells_every_region_in_120_columns(explanation: sepc.Explanation) -> None:
    lines = str(explanation).splitlines()
    assert max(map(len, lines)) <= WIDTH == 120
    for one in explanation.regions:
        assert sum(text.startswith(one.name + " ") for text in lines) == 1
    assert next(text for text in lines if text.startswith("all ")).split()[1] == str(len(explanation.regions))
    assert "There is no prediction for 2 of the" in str(explanation)


def test_the_dictionary_goes_through_json_and_back(explanation: sepc.Explanation) -> None:
    plain = explanation.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert [one["name"] for one in plain["regions"]] == [one.name for one in explanation.regions]
    assert plain["totals"]["all"]["flops"] == sum(one["flops"] for one in plain["regions"])
    assert len(plain["decisions"]) == len(explanation.decisions)
    assert {one["pass_name"] for one in plain["decisions"]} <= {one["name"] for one in plain["passes"]}
    assert next(one for one in plain["decisions"] if one["pass_name"] == "fuse")["gain_us"] == -2


# ---- with a profile


def test_a_profile_adds_measured_times() -> None:
    compiled = sepc.compile(nn.Conv2d(3, 4, 3).eval(), example_inputs=(X,), num_threads=1)
    explanation, profile = compiled.explain(), compiled.profile(X, repeats=2)
    assert explanation.measured_us is None
    found = explanation.with_profile(profile)
    assert [one.measured_us for one in found.regions] == [one.measured_us for one in profile]
    assert found.measured_us == pytest.approx(profile.measured_us)
    assert found.to_dict()["regions"][0]["measured_us"] == profile[0].measured_us
    drawn = found.graph.regions
    assert [drawn[one.name].measured_us for one in profile] == [one.measured_us for one in profile]
    other = sepc.compile(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)).eval(), example_inputs=(X[..., :4],))
    with pytest.raises(sepc.InputError, match="not of this model"):
        other.explain().with_profile(profile)


def test_the_source_of_a_kernel_in_each_form(explanation: sepc.Explanation) -> None:
    first = next(one for one in explanation.regions if one.kernel == "sepc")
    assert "T.prim_func" in explanation.source(first.name)
    assert "define" in explanation.source(first.name, "llvm")
    (fallback,) = (one for one in explanation.regions if one.kernel == "torch")
    assert not explanation.has_source(fallback.name)
    with pytest.raises(sepc.SepcError, match=f"no kernel for region '{fallback.name}'"):
        explanation.source(fallback.name)


# ---- where it comes from


def test_it_is_the_same_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEPC_CACHE", "1")
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sepc.cache.read_sources_digest", lambda: keys.SOURCES_DIGEST)
    model = Mixed().eval()
    first = sepc.explain(model, X)
    compiled = sepc.compile(model, example_inputs=(X,))
    assert list(compiled.compile_times) == ["capture", "cache"]
    second = compiled.explain()
    assert second.regions == first.regions
    assert second.decisions == first.decisions
    assert second.storages == first.storages
    assert second.graphs == first.graphs
    assert second.source(second.regions[0].name) == first.source(first.regions[0].name)
    assert second.by_kernel["torch"].regions == 1


def test_a_target_that_this_host_cannot_run_is_explained_with_its_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "missing_features", lambda self, host=None: ("avx512f",))
    found = sepc.explain(Mixed().eval(), X, target="x86-64-v4")
    assert [one.ops for one in found.regions if one.kernel == "torch"] == [("baddbmm.default",)]
    with pytest.raises(sepc.ModelError, match="baddbmm"):
        sepc.compile(Mixed().eval(), target="x86-64-v4", example_inputs=(X,))


def test_a_compiled_model_explains_what_it_compiled_last_or_other_arguments() -> None:
    compiled = sepc.compile(nn.Conv2d(3, 4, 3).eval(), fullgraph=True)
    with pytest.raises(sepc.SepcError, match="Nothing is compiled yet"):
        compiled.explain()
    other = compiled.explain(torch.randn(1, 3, 5, 5))
    assert other.total.flops == 2 * 9 * 4 * 27
    with pytest.raises(sepc.SepcError, match="Nothing is compiled yet"):
        compiled.explain()
    compiled(X)
    assert compiled.explain().total.flops == compiled.explain(X).total.flops == 2 * 14 * 14 * 4 * 27


def test_a_loaded_model_knows_no_reasons(tmp_path: Path) -> None:
    compiled = sepc.compile(nn.ReLU().eval(), example_inputs=(X,))
    compiled.save(tmp_path / "model.sepc")
    with pytest.raises(sepc.SepcError, match="does not know why"):
        sepc.load(tmp_path / "model.sepc").explain()
