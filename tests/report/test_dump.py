"""The dump: files where something changed, one page that links and explains them, and nothing of an earlier dump."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import sepc
from sepc.frontend.export import capture
from sepc.ir.printer import print_graph
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import PIPELINE
from sepc.report.dump import Dump
from sepc.target import Target
from tests.helpers import with_statistics

X = torch.randn(1, 3, 8, 8)
Dumped = tuple[Path, nn.Module, fx.GraphModule]


def network() -> nn.Module:
    return with_statistics(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    )


def dump(directory: Path, model: nn.Module) -> fx.GraphModule:
    """The optimised graph of the model, whose passes are dumped."""
    module = capture(model, (X,)).graph_module
    context = PassContext(machine=Target.parse("x86-64-v3").machine)
    PassManager(PIPELINE, verify_each=True, observers=[Dump(directory)]).run(module, context)
    return module


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    """A directory that is only looked at, the model, and its optimised graph."""
    directory, model = tmp_path_factory.mktemp("ir"), network()
    return directory, model, dump(directory, model)


def stems(directory: Path) -> list[str]:
    return sorted({path.stem for path in directory.iterdir() if path.suffix in {".py", ".dot", ".svg"}})


def test_there_are_files_where_something_changed(dumped: Dumped) -> None:
    directory, _, module = dumped
    changed = ["000_input", "002_canonicalize", "004_fold-batch-norm", "008_group", "012_plan-layout"]
    assert stems(directory) == [*changed, "014_choose-tiling"]
    assert all((directory / f"{stem}.dot").read_text().startswith("digraph") for stem in changed)
    assert all((directory / f"{stem}.svg").read_text().endswith("</svg>\n") for stem in changed)
    last = (directory / "014_choose-tiling.py").read_text()
    assert print_graph(module, decorator="rebuild.region") in last
    assert "predicted 0." in last


def test_a_dumped_program_computes_what_the_model_does(dumped: Dumped) -> None:
    directory, model, _ = dumped
    for stem in stems(directory):
        path = directory / f"{stem}.py"
        variables: dict[str, object] = {"__name__": "dumped", "__file__": str(path)}
        exec(compile(path.read_text(), str(path), "exec"), variables)
        rebuilt = variables["graph_module"]
        assert isinstance(rebuilt, fx.GraphModule)
        torch.testing.assert_close(rebuilt(X)[0], model(X))


def test_a_dumped_program_runs_by_itself_wherever_it_is_called_from(dumped: Dumped, tmp_path: Path) -> None:
    command = [sys.executable, str(dumped[0] / "008_group.py")]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(tensor([[[[")


def test_each_weight_is_written_once(dumped: Dumped) -> None:
    written = [torch.load(path) for path in (dumped[0] / "weights").iterdir()]
    # Of the second convolution; of the first, as given and folded; of the normalisation, one of which is a counter.
    second, first, normalisation = [(4,), (4, 8, 1, 1)], [(8,), *[(8, 3, 3, 3)] * 2], [(), *[(8,)] * 4]
    assert sorted(tuple(one.shape) for one in written) == sorted([*second, *first, *normalisation])


def test_the_page_links_every_file_and_shows_times_differences_and_decisions(dumped: Dumped) -> None:
    directory = dumped[0]
    page = (directory / "index.html").read_text()
    links = set(re.findall(r'href="([^"#]+)"', page))
    assert links == {path.name for path in directory.iterdir() if path.suffix in {".py", ".dot", ".svg"}}
    assert not re.search(r"https?://|<script|<link", page)
    assert re.search(r'<td><a href="#fold-batch-norm">fold-batch-norm</a></td>\s*<td class="number">\d+\.\d</td>', page)
    assert '<span class="gone">-    batch_norm = aten.batch_norm.default(' in page
    assert "folded into the weights before it" in page


def test_a_new_dump_leaves_nothing_of_an_earlier_one_but_what_is_not_its_own(tmp_path: Path) -> None:
    dump(tmp_path, nn.ReLU())
    for name in ("099_mine.py", "repeat.sh", "traceback.txt", "notes.py", "input.pt2"):
        (tmp_path / name).write_text("")
    stale = tmp_path / "weights" / "0123456789abcdef.pt"
    stale.write_bytes(b"")
    dump(tmp_path, nn.ReLU())
    assert not stale.exists()
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("0")} == {
        *("index.html", "weights", "notes.py", "input.pt2")
    }
    assert "099_mine" not in stems(tmp_path)


def test_without_graphviz_there_are_sources_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    dump(tmp_path, nn.ReLU())
    assert {path.suffix for path in tmp_path.iterdir() if path.name.startswith("0")} == {".py", ".dot"}


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sepc.InputError, match=r"The dump cannot be written\.\n  Where: .*/file/ir\n  Why: Not a dir"):
        dump(tmp_path / "file" / "ir", nn.ReLU())


def test_compile_dumps_what_it_compiles_although_that_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPC_CACHE", "1")
    monkeypatch.setenv("SEPC_CACHE_DIR", str(tmp_path / "cache"))
    model = network()
    sepc.compile(model, example_inputs=(X,))
    directory = tmp_path / "ir"
    compiled = sepc.compile(model, dump_dir=directory)
    assert not directory.exists()
    torch.testing.assert_close(compiled(X), model(X))
    assert "000_input" in stems(directory)
    assert compiled.regions[0].name in (directory / "014_choose-tiling.py").read_text()
