"""The examples of README.md run as they stand there, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.docs.pages import README, ROOT, blocks

EXAMPLES = [block.text for block in blocks(README) if block.language == "python"]


def test_there_are_examples() -> None:
    calls = ("sepc.compile(model)", "sepc.separate(", "torch.compile(")
    assert [[call in example for call in calls] for example in EXAMPLES] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=["compile", "separate", "torch_compile"])
def test_an_example_runs(example: str) -> None:
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
