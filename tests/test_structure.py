"""Rules about the source itself: who imports what, tables that must agree, and documentation of what exists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "sepc").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """All modules that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def loaded(statement: str) -> set[str]:
    """Top-level packages that are loaded after `statement` in a fresh interpreter."""
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_tvm_is_imported_under_backends_only() -> None:
    users = {path for path in SOURCES for name in imports(path) if name.partition(".")[0] in ("tvm", "tvm_ffi")}
    assert users
    assert {path.relative_to(ROOT).parts[1] for path in users} == {"backends"}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("ir", ("sepc.passes", "sepc.backends", "sepc.frontend", "sepc.cost_model")),
        ("cost_model", ("sepc.passes", "sepc.backends", "sepc.frontend")),
        ("frontend", ("sepc.passes", "sepc.backends", "sepc.cost_model")),
        ("passes", ("sepc.backends", "sepc.frontend", "sepc._compile", "sepc.compiled")),
        ("backends", ("sepc.frontend", "sepc._compile", "sepc.compiled")),
        ("runtime", ("sepc.ir", "sepc.passes", "sepc.backends", "sepc.frontend", "sepc._compile", "sepc.compiled")),
    ],
)
def test_arrows_between_packages_point_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if path.relative_to(ROOT / "sepc").parts[0] == package
        for name in imports(path)
        if name.startswith(forbidden)
    ]
    assert not wrong


def test_the_cost_model_needs_neither_torch_nor_tvm() -> None:
    assert not loaded("import sepc.cost_model.search") & {"torch", "tvm"}


def test_importing_sepc_loads_no_heavy_package() -> None:
    assert not loaded("import sepc") & {"torch", "tvm", "tvm_ffi", "numpy", "graphviz", "networkx", "timm"}


def test_compiling_api_loads_little_beyond_torch() -> None:
    code = (
        "import time, torch, torch.export; t = time.process_time()"
        "; import sepc; sepc.compile; print(time.process_time() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
    assert "tvm" not in loaded("import sepc; sepc.compile")


def test_loggers_have_the_names_of_their_modules_and_nothing_else_is_printed() -> None:
    """So that ``TORCH_LOGS="+sepc.passes"`` and standard handlers work; programs are there to print."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call) else ""
            own = (
                text.startswith("logging.getLogger(") and text != "logging.getLogger(__name__)" and "'torch" not in text
            )
            printed = text.startswith(("print(", "warnings.warn(")) and path.parent.name != "cli"
            wrong += [f"{path.relative_to(ROOT)}: {text}"] if own or printed else []
    assert not wrong


@pytest.mark.parametrize("name", ["sepc", "sepc.passes", "sepc.passes.manager"])
def test_pytorch_turns_the_logs_of_packages_and_modules_on(name: str) -> None:
    code = """
import torch
from torch import nn
import sepc
from sepc.frontend.export import capture
from sepc.passes.manager import PassContext, PassManager
from sepc.passes.pipeline import SPELLING

module = capture(nn.BatchNorm2d(3).eval(), (torch.randn(1, 3, 4, 4),)).graph_module
PassManager(SPELLING).run(module, PassContext())
"""
    environment = {**os.environ, "TORCH_LOGS": f"+{name}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert re.search(r"manager.py:\d+\] promote: no change, ", done.stderr)
    assert "canonicalize: getitem: taken: " in done.stderr


def test_every_elementwise_operator_has_a_rule_and_a_cost() -> None:
    from sepc.backends.stages.elementwise import RULES
    from sepc.ir.elementwise import OPERATIONS

    assert RULES.keys() == OPERATIONS.keys()


def test_every_pass_of_the_pipeline_is_in_the_registry_under_its_name() -> None:
    from sepc.passes.pipeline import PASSES, PIPELINE

    assert [one.name for one in PIPELINE] == list(PASSES)
    assert all(PASSES[one.name] is type(one) for one in PIPELINE)


def test_what_the_public_api_names_can_be_imported() -> None:
    import sepc

    assert all(getattr(sepc, name) is not None for name in sepc.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        sepc.nonsense  # noqa: B018 -- the access is what is tested


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_every_path_in_the_architecture_page_exists() -> None:
    paths = set(re.findall(r"\b((?:sepc|tests|docs|examples|benchmarks)/[\w./*-]*)", ARCHITECTURE))
    missing = [path for path in sorted(paths) if not list(ROOT.glob(path.rstrip("./") if "." in path else path))]
    assert len(paths) > 30
    assert not missing


def test_the_architecture_page_lists_every_source_and_every_pass() -> None:
    from sepc.passes.pipeline import PIPELINE

    assert not [one.name for one in PIPELINE if one.name not in ARCHITECTURE]
    listed = {path.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"}
    listing = ARCHITECTURE.partition("## Folders")[2].partition("\n## ")[0]
    assert not [
        path for path in sorted(listed) if path not in listing and Path(path).parent.as_posix() + "/*" not in listing
    ]


@pytest.mark.parametrize("name", re.findall(r"`(sepc(?:\.\w+)+)`", ARCHITECTURE))
def test_every_module_and_object_in_the_architecture_page_exists(name: str) -> None:
    import importlib

    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(module), attribute)
