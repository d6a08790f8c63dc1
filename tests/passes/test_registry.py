"""Passes of other packages, found by their entry points; the one of the documentation is what is tried."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from sepc.cli.opt import main
from sepc.errors import InputError
from sepc.passes import registry
from sepc.passes.pipeline import PASSES
from sepc.passes.selection import make_pass

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "custom_pass"
NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()
    return nn.Sequential(*layers), torch.randn(1, 3, 8, 8)
"""


def install(site: Path, name: str, value: str) -> None:
    """What an installer leaves of a package with that entry point."""
    metadata = site / f"{value.partition(':')[0]}-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {metadata.name.partition('-')[0]}\nVersion: 0.1.0\n"
    )
    (metadata / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {value}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is searched for packages."""
    path = tmp_path / "site-packages"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    return path


@pytest.fixture
def example(site: Path) -> None:
    """The package of the documentation, installed."""
    for name, value in tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"][
        registry.GROUP
    ].items():
        install(site, name, value)
    shutil.copy(EXAMPLE / "drop_relu.py", site)


def test_the_page_shows_the_example_as_it_is_which_is_short() -> None:
    page = (ROOT / "docs" / "writing-a-pass.md").read_text()
    code = (EXAMPLE / "drop_relu.py").read_text()
    assert f"```python\n{code}```" in page
    assert f"```toml\n{(EXAMPLE / 'pyproject.toml').read_text()}```" in page
    assert len(code.splitlines()) < 40


@pytest.mark.usefixtures("example")
def test_sepc_opt_lists_and_runs_a_pass_of_another_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-passes"]) == 0
    assert "drop-relu             ReLU of what is not negative is that itself." in capsys.readouterr().out
    (tmp_path / "net.py").write_text(NET)
    assert main([f"{tmp_path / 'net.py'}:make", "--passes", "drop-relu", "--diff"]) == 0
    changed = [line for line in capsys.readouterr().out.splitlines()[2:] if line[0] in "+-"]
    assert [line for line in changed if line.startswith("-") and "relu" in line]
    assert main([f"{tmp_path / 'net.py'}:make", "--passes", "drop-relu", "--statistics"]) == 0
    out = capsys.readouterr().out
    assert "   1 × taken: ReLU of aten.sigmoid.default" in out
    assert "   1 × rejected: ReLU of aten.conv" in out


@pytest.mark.usefixtures("example")
def test_options_have_the_types_of_their_fields() -> None:
    assert vars(make_pass("drop-relu", "most=2"))["most"] == 2
    with pytest.raises(InputError, match=r"'two' is not a whole number(.|\n)*drop-relu\{most=two\}"):
        make_pass("drop-relu", "most=two")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("Mine = 3", "no dataclass with a method `run`"),
        (
            "import dataclasses\n@dataclasses.dataclass\nclass Mine:\n    name = 'yours'\n    def run(self): ...",
            "its `name` is 'yours'",
        ),
    ],
)
def test_an_entry_point_that_makes_no_pass_is_one_clear_error(site: Path, code: str, why: str) -> None:
    module = f"broken_{abs(hash(code))}"
    (site / f"{module}.py").write_text(code)
    install(site, "mine", f"{module}:Mine")
    with pytest.raises(InputError, match=rf"'mine' cannot be used(.|\n)*{module}:Mine of package {module}") as caught:
        registry.pass_class("mine")
    assert why in str(caught.value)


OPTIONS = """
import dataclasses

@dataclasses.dataclass
class Mine:
    name = "mine"
    wanted: bool
    limit: float = 1.0
    shape: tuple = ()
    def run(self, *_): ...
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "Option 'wanted' of mine is not given"),
        ("wanted=maybe", "'maybe' is not true or false"),
        ("wanted=true limit=much", "'much' is not a number"),
        ("wanted=true shape=3", "cannot be given as text"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_error(site: Path, options: str, message: str) -> None:
    (site / "optional.py").write_text(OPTIONS)
    install(site, "mine", "optional:Mine")
    assert vars(make_pass("mine", "wanted=false limit=2")) == {"wanted": False, "limit": 2.0, "shape": ()}
    with pytest.raises(InputError, match=message):
        make_pass("mine", options)


def test_a_name_that_is_taken_is_an_error(site: Path) -> None:
    install(site, next(iter(PASSES)), "other:Pass")
    with pytest.raises(InputError, match="There are two passes 'promote'"):
        registry.names()


def test_without_other_packages_the_passes_are_those_of_the_pipeline() -> None:
    assert registry.names() == tuple(PASSES)
