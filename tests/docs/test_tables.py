"""What pages list is all there is: environment variables, errors, the public API, pages; and links lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import sepc
from sepc import errors
from tests.docs.pages import PAGES, README, ROOT, blocks

DOCS = ROOT / "docs"
SOURCES = [
    path
    for folder in ("sepc", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".c", ".cpp", ".jinja") and "output" not in path.parts
]


def headings(page: Path, level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", page.read_text(), re.MULTILINE)


def test_the_table_of_environment_variables_is_that_of_the_sources() -> None:
    used = {name for path in SOURCES for name in re.findall(r"\bSEPC_[A-Z0-9_]*[A-Z0-9]\b", path.read_text())}
    listed = re.findall(r"^\| `(SEPC_\w+)` \|", (DOCS / "environment.md").read_text(), re.MULTILINE)
    assert len(used) > 3
    assert listed == sorted(used)


def test_the_errors_page_has_a_section_for_each_class_with_an_example() -> None:
    defined = {name for name, one in vars(errors).items() if inspect.isclass(one) and issubclass(one, sepc.SepcError)}
    classes = defined & set(sepc.__all__)
    # What is not public is caught inside, or is told as what it is a kind of.
    assert all(vars(errors)[name].__base__.__name__ in classes - {"SepcError"} for name in defined - classes)
    page = DOCS / "errors.md"
    assert sorted(headings(page, 2)) == sorted(classes)
    shown = [block.text for block in blocks(page) if block.language == "text"]
    assert [name for name in sorted(classes) if not any(f"{name}: " in text for text in shown)] == []


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^\.\. auto\w+:: sepc\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(name for name in sepc.__all__ if not name.startswith("__"))


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^[a-z-]+$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.stem != "index")


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_links_to_files_lead_to_files(page: Path) -> None:
    """Those of the README too, which is no page of Sphinx's; anchors are checked where there is one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = page if not path else page.parent / path
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            names = [name for level in (1, 2, 3) for name in headings(found, level)]
            slugs = [re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names]
            assert anchor in slugs, f"{page.name}: {target}"
