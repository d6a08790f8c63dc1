"""The table of a bundle: its rows say what they claim, and what cannot be had is told."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import bundle
from sepc.c_compiler import c_compiler
from tests.bundle.test_emulation import needs_tools


@needs_tools
def test_the_table_of_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bundle.txt"
    options = ["mobilenetv2_035", "--size", "32", "--qemu", "no-such-emulator", "--output", str(output)]
    assert bundle.main(options) == 0
    text = output.read_text()
    assert text == capsys.readouterr().out
    assert text.startswith("mobilenetv2_035, input [1, 3, 32, 32], one thread, target arm64")
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines()[2:])
    weights, arena, code = (
        int(rows[name].removesuffix(" bytes").replace(",", "")) for name in ("weights", "arena", "kernels, code")
    )
    assert 1_677_000 * 4 * 0.95 < weights < 1_677_000 * 4 * 1.2  # the parameters of that model
    assert 1000 < code < weights
    assert 32 * 32 < arena < weights
    assert rows["undefined symbols of the bundle"] == "none"
    assert "agrees" in rows["largest difference from eager, x86-64-v3"]
    assert "not counted: no-such-emulator is not installed" in rows["instructions of one inference"]


def test_the_plugin_compiles_without_a_warning(tmp_path: Path) -> None:
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-missing-declarations", "-shared", "-fPIC"]
    subprocess.run([c_compiler(), *flags, "-o", tmp_path / "plugin.so", bundle.PLUGIN], check=True)


@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="needs an emulator that loads plugins")
@needs_tools
def test_instructions_are_those_of_the_second_inference(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text("""
#include <stdlib.h>
int main(int count, char** arguments) {
  volatile int sum = 0;
  (void)count;
  for (int turn = 0; turn <= atoi(arguments[2]); ++turn)
    for (int i = 0; i < 100000; ++i)
      __asm__ volatile("fmla v0.4s, v1.4s, v2.s[3]\\nfmla v3.4s, v1.4s, v2.4s\\nnop\\nnop");
  return sum;
}
""")
    compiler = "aarch64-linux-gnu-gcc"
    subprocess.run([compiler, "-O1", "-static", "-o", "program", "main.c"], cwd=tmp_path, check=True)
    found = re.match(
        r"([\d,]+), of which ([\d,]+) ", bundle.instructions(tmp_path / "program", (), tmp_path, "qemu-aarch64")
    )
    assert found
    every, useful = (int(one.replace(",", "")) for one in found.groups())
    assert useful == 200_000
    assert 600_000 <= every <= 900_000
