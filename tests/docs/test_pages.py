"""The pages of docs/ are true: their Python runs and prints what they say, and their commands have these options."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest

from tests.docs.pages import PAGES, README, ROOT, Program, blocks, commands, program

Run = Callable[..., dict[str, Any]]
PYPROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Of programs that are not ours, options are not looked up.
FOREIGN: Final = ("apt", "cmake", "cc", "aarch64-linux-gnu-gcc", "qemu-aarch64-static", "build/model_main", "cat", "cd")
PROGRAMS: Final = [one for one in map(program, PAGES) if one.steps]


@pytest.mark.parametrize(
    "page",
    [pytest.param(one, id=one.page.stem, marks=[pytest.mark.slow] if one.is_slow else []) for one in PROGRAMS],
)
def test_what_a_page_shows_runs_and_prints_what_it_says(page: Program, tmp_path: Path) -> None:
    assert not differences(page, tmp_path)


def differences(page: Program, directory: Path) -> list[str]:
    """Where a page prints something else than it says, if it runs in `directory`; it has to run."""
    texts = json.dumps([[page.page.name, block.line, block.text] for block, _ in page.steps])
    command = [sys.executable, str(ROOT / "tests" / "docs" / "run_blocks.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        command, input=texts, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    check = doctest.OutputChecker().check_output
    return [
        f"{page.page.name}:{block.line} prints\n{printed}"
        for (block, expected), printed in zip(page.steps, json.loads(done.stdout), strict=True)
        if expected is not None
        and not check(expected.replace("…", "..."), printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    ]


PAGE: Final = """
```python
x = 2
```

```python excerpt
nowhere()
```

```python slow
print(f"{x} is {x}")
```

```text output
2 is …
```

```python
print(1 / (3 - x))
```

```text output
2.0
```
"""


def test_blocks_run_in_order_and_what_they_print_is_compared(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    found = program(page)
    assert [(block.text, expected) for block, expected in found.steps] == [
        ("x = 2\n", None),
        ('print(f"{x} is {x}")\n', "2 is …\n"),
        ("print(1 / (3 - x))\n", "2.0\n"),
    ]
    assert found.is_slow
    assert differences(found, tmp_path) == ["page.md:18 prints\n1.0\n"]
    page.write_text(PAGE.replace("x = 2", "x = 3"))
    with pytest.raises(AssertionError, match=r'"page\.md", line 19'):
        differences(program(page), tmp_path)


def test_pages_have_programs_and_commands() -> None:
    assert len(PROGRAMS) > 4
    assert sum(1 for page in (README, *PAGES) for _ in commands(page)) > 30


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_blocks_are_of_a_known_kind_and_python_is_python(page: Path) -> None:
    for block in blocks(page):
        kind = " ".join((block.language, *block.words))
        assert block.language != "python" or set(block.words) <= {"slow", "excerpt"}, f"{page.name}:{block.line} {kind}"
        if block.language == "python":
            ast.parse(block.text)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # Of a module that a test has imported before.
@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_commands_exist_and_have_the_options_that_are_shown(page: Path) -> None:
    wrong = [f"{page.name}:{line}: {' '.join(words)}: {why}" for line, words in commands(page) if (why := fault(words))]
    assert not wrong


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("sepc-opt timm:x --dump-irr", "no option --dump-irr"),
        ("sepc-opt --list-passes -q", "no option -q"),
        ("sepc-optt x", "no such program"),
        ("make dem", "no target dem"),
        ("pip install .[nothing]", "no extra nothing"),
        ("python examples/nothing.py", "no such file"),
        ("python -m benchmarks.compare --thread 1", "no option --thread"),
        ("sepc-opt net.py:make --passes canonicalize --target=arm64 -o x", ""),
        ("python -m benchmarks.compare mobilenetv1_100 --threads 1 2", ""),
        ("make bench BENCH_ARGS=x", ""),
        ("pip install -e .[docs]", ""),
    ],
)
def test_a_wrong_command_is_found(command: str, why: str) -> None:
    assert fault(command.split()) == why


def fault(words: list[str]) -> str:
    """What is wrong with a command; empty if nothing is."""
    name, *arguments = words
    if name in FOREIGN:
        return ""
    if name == "make":
        known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((f"no target {one}" for one in arguments if "=" not in one and one not in known), "")
    if name == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        known = list(PYPROJECT["project"]["optional-dependencies"])
        return next((f"no extra {one}" for text in extras for one in text.split(",") if one not in known), "")
    found = program_of(words)
    if found is None:
        return "no such program"
    run, name, count = found
    if run is runpy.run_path and not Path(name).is_file():
        return "no such file"
    options = [one.partition("=")[0] for one in words[count:] if re.match(r"--?[a-zA-Z]", one)]
    text = help_of(run, name)
    return next((f"no option {one}" for one in options if not re.search(rf"(?<![\w-]){one}(?![\w-])", text)), "")


def program_of(words: list[str]) -> tuple[Run, str, int] | None:
    """How a command's program is run, its name, and of how many words the command that name is; None for no program."""
    scripts = PYPROJECT["project"]["scripts"]
    match words:
        case [script, *_] if script in scripts:
            return runpy.run_module, scripts[script].partition(":")[0], 1
        case ["python", "-m", module, *_]:
            return runpy.run_module, module, 3
        case ["python", path, *_] if path.endswith(".py"):
            return runpy.run_path, str(ROOT / path), 2
    return None


@cache
def help_of(run: Run, name: str) -> str:
    """What a program prints for ``--help``. It runs in this process, where PyTorch is imported already."""
    arguments = mock.patch.object(sys, "argv", [name, "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as output, arguments, contextlib.suppress(SystemExit):
        run(name, run_name="__main__")
    return output.getvalue()
