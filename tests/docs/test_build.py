"""The documentation builds without a warning, and its pages need nothing that is not beside them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT


@pytest.mark.slow
def test_it_builds_without_a_warning_for_use_without_a_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        html = (tmp_path / f"{page.stem}.html").read_text()
        loaded = re.findall(r"<(?:script|link|img|object|iframe)\b[^>]*?\b(?:src|href|data)=\"([^\"]+)\"", html)
        assert loaded
        assert not [one for one in loaded if one.startswith(("http:", "https:", "//"))], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text())
    (source / "index.md").write_text("# Title\n\n[nowhere](missing.md) [nor here](#missing)\n")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run(
        [*command, str(source), str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "missing.md" in done.stderr
    assert "#missing" in done.stderr or "'missing'" in done.stderr
