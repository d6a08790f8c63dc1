"""Shared libraries for TVM's runtime: called by it, by C, and for another architecture under emulation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sepc
from sepc import c_compiler
from sepc.errors import ArtifactError, TargetError
from tests.bundle.test_emulation import needs_tools
from tests.helpers import TOLERANCE, Function

X = torch.randn(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(240, 7)).eval()


@pytest.mark.parametrize("threads", [1, 3])
def test_tvms_runtime_runs_it_without_pytorch(tmp_path: Path, threads: int) -> None:
    compiled = sepc.compile(network(), num_threads=threads, example_inputs=(X,))
    compiled.export(tmp_path, format="tvm")
    np.save(tmp_path / "x.npy", X.numpy())
    np.save(tmp_path / "y.npy", compiled(X).numpy())
    readme = (tmp_path / "README.md").read_text()
    code = next(block for block in readme.split("```python\n")[1:] if "import tvm" in block).partition("```")[0]
    program = f"""
import sys
sys.modules["torch"] = None
import numpy as np
{code}
input_0.copyfrom(np.load("x.npy"))
assert main(input_0, output_0) == 0
assert np.array_equal(output_0.numpy(), np.load("y.npy"))
try:
    main(output_0, output_0)
except (TypeError, ValueError) as error:
    assert "input_0" in str(error), error
else:
    raise AssertionError("a tensor of another shape was taken")
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)


def test_it_needs_the_c_library_and_no_other(tmp_path: Path) -> None:
    sepc.compile(network(), num_threads=2, example_inputs=(X,)).export(tmp_path, format="tvm", name="net")
    shown = subprocess.run(["readelf", "-d", tmp_path / "net.so"], check=True, capture_output=True, text=True).stdout
    needed = {line.partition("[")[2].partition("]")[0] for line in shown.splitlines() if "(NEEDED)" in line}
    assert {one.partition(".so")[0] for one in needed} <= {"libc", "libm", "libpthread"}


@needs_tools
def test_a_library_for_another_architecture_runs_there(tmp_path: Path) -> None:
    model = network()
    sepc.compile(model, target="arm64", num_threads=2, example_inputs=(X,)).export(tmp_path, format="tvm", name="net")
    (tmp_path / "user.c").write_text("""
#include <stdio.h>
int net_call(void*, void*);
int main(void) {
  static float x[360], y[7];
  if (fread(x, 4, 360, stdin) != 360 || net_call(x, y)) return 1;
  return fwrite(y, 4, 7, stdout) != 7;
}
""")
    compiler = "aarch64-linux-gnu-gcc"
    subprocess.run([compiler, "user.c", "-L.", "-l:net.so", "-Wl,-rpath,.", "-o", "user"], cwd=tmp_path, check=True)
    command = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", "./user"]
    done = subprocess.run(command, cwd=tmp_path, input=X.numpy().tobytes(), check=True, capture_output=True)
    with torch.no_grad():
        expected = model(X).numpy()[0]
    assert np.abs(np.frombuffer(done.stdout, np.float32) - expected).max() <= TOLERANCE * np.abs(expected).max()
    with pytest.raises(ArtifactError, match="the aarch64 architecture"):
        sepc.load(tmp_path)


def test_without_a_cross_compiler_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = sepc.compile(nn.Conv2d(3, 4, 3).eval(), target="arm64", example_inputs=(X,))
    monkeypatch.setattr(c_compiler.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match=r"aarch64-linux-gnu-gcc is not installed(.|\n)*gcc-aarch64-linux-gnu"):
        compiled.export(tmp_path, format="tvm")


def test_outputs_are_told_as_tensors_where_they_are(tmp_path: Path) -> None:
    model = Function(lambda self, x: (x.relu(), (y := x + 1).mT, y[:, 1:]))
    sepc.compile(model.eval(), num_threads=1, example_inputs=(X,)).export(tmp_path, format="tvm")
    text = (tmp_path / "README.md").read_text()
    assert text.count('= tvm.runtime.empty([1, 3, 12, 10], "float32")') == 2  # the input, and the first result
    assert text.count('= tvm.runtime.empty([360], "float32")') == 1  # two results in one memory
    found = sepc.load(tmp_path)(X)
    with torch.no_grad():
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, model(X), strict=True))
