"""Bundles on this host: they compile without a warning, run like the model, and touch nothing that is not theirs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sepc
from sepc.c_compiler import c_compiler
from sepc.errors import ArtifactError, InputError, ModelError, SepcError
from tests.helpers import TOLERANCE, Function

WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def network() -> nn.Module:
    """A little of everything: dense, depthwise, pointwise and linear layers, a branch, a pooling."""
    torch.manual_seed(0)
    return Function(
        lambda self, x, y: (self.head((self.body(x) + y).mean((2, 3))), self.body(x).flatten(1).softmax(1)),
        body=nn.Sequential(
            *(nn.Conv2d(3, 20, 3, 2, 1), nn.Hardswish(), nn.Conv2d(20, 20, 5, 1, 2, groups=20)),
            *(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 36, 1), nn.MaxPool2d(2)),
        ),
        head=nn.Linear(36, 10),
    ).eval()


INPUTS = (torch.randn(2, 3, 31, 29), torch.randn(2, 36, 8, 7))


def exported(path: Path, model: nn.Module, *inputs: torch.Tensor, name: str = "net", threads: int = 1) -> None:
    sepc.compile(model, num_threads=threads, example_inputs=inputs).export(path, name=name)


def build(path: Path, name: str = "net", *flags: str) -> Path:
    sources = [one.name for one in path.iterdir() if one.suffix in (".c", ".S", ".o")]
    command = [c_compiler(), *WARNINGS, *flags, "-O1", "-pthread", "-I.", "-o", f"{name}.bin", *sorted(sources), "-lm"]
    subprocess.run(command, cwd=path, check=True)
    return path / f"{name}.bin"


def results(program: Path, inputs: tuple[torch.Tensor, ...], outputs: int) -> list[torch.Tensor]:
    """What the program writes, as flat tensors; sanitizers make it fail if anything is wrong."""
    files = [
        program.parent / f"{kind}{index}" for kind, n in (("in", len(inputs)), ("out", outputs)) for index in range(n)
    ]
    for file, tensor in zip(files, inputs, strict=False):
        tensor.numpy().tofile(file)
    subprocess.run([program, *files], check=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"})
    return [torch.from_numpy(np.fromfile(file, np.float32)) for file in files[len(inputs) :]]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_bundle_agrees_with_eager_and_sanitizers_find_nothing(tmp_path: Path, threads: int) -> None:
    model = network()
    exported(tmp_path, model, *INPUTS, threads=threads)
    found = results(build(tmp_path, "net", *SANITIZERS), INPUTS, 2)
    with torch.no_grad():
        for actual, expected in zip(found, model(*INPUTS), strict=True):
            assert (actual - expected.flatten()).abs().max() <= TOLERANCE * expected.abs().max()


def test_it_needs_nothing_but_the_c_library(tmp_path: Path) -> None:
    exported(tmp_path, network(), *INPUTS)
    symbols = subprocess.run(["nm", "-u", build(tmp_path)], check=True, capture_output=True, text=True).stdout
    undefined = {line.split()[-1] for line in symbols.splitlines() if " U " in line}
    assert undefined
    assert all(re.search(r"@(GLIBC|LIBC|GCC)", one) for one in undefined)
    assert not {one.split("@")[0] for one in undefined} & {"malloc", "calloc", "realloc", "aligned_alloc", "mmap"}


def test_two_bundles_fit_into_one_program(tmp_path: Path) -> None:
    for name in ("one", "two"):
        exported(tmp_path / name, network(), *INPUTS, name=name)
    main = """
#include "one/one.h"
#include "two/two.h"
static _Alignas(64) unsigned char arena[ONE_ARENA_BYTES];
int main(void) {
  static float x[ONE_INPUT_0_BYTES / 4], y[ONE_INPUT_1_BYTES / 4], a[ONE_OUTPUT_0_BYTES / 4], b[ONE_OUTPUT_1_BYTES / 4];
  const void* inputs[] = {x, y};
  void* outputs[] = {a, b};
  return one_run(arena, one_weights, inputs, outputs) || two_run(arena, two_weights, inputs, outputs)
      || two_run(arena + 1, two_weights, inputs, outputs) != TWO_MISALIGNED;
}
"""
    (tmp_path / "both.c").write_text(main)
    objects = []
    for name in ("one", "two"):
        for source in (f"{name}.c", "weights.S"):
            objects.append(f"{name}/{source}.o")
            command = [c_compiler(), *WARNINGS, "-c", source, "-o", f"{source}.o", "-I."]
            subprocess.run(command, cwd=tmp_path / name, check=True)
        objects.append(f"{name}/kernels.o")
    subprocess.run([c_compiler(), *WARNINGS, "both.c", *objects, "-lm", "-o", "both"], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "both"], check=True)


def test_the_readme_of_a_bundle_tells_how_to_build_it(tmp_path: Path) -> None:
    exported(tmp_path, network(), *INPUTS, threads=2)
    readme = (tmp_path / "README.md").read_text()
    command = next(line.strip() for line in readme.splitlines() if line.strip().startswith("cc "))
    subprocess.run(command.replace("cc ", f"{c_compiler()} ", 1), shell=True, cwd=tmp_path, check=True)
    code = readme.partition("```c\n")[2].partition("```")[0]
    (tmp_path / "user.c").write_text(code)
    subprocess.run([c_compiler(), *WARNINGS, "-c", "user.c", "-I."], cwd=tmp_path, check=True)
    assert "- input 1: float32[2, 36, 8, 7], in this order of dimensions" in readme
    assert "- result 0 of the model: float32[2, 10] in output 0, with strides of [10, 1] elements" in readme


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    exported(tmp_path, nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8))
    program = build(tmp_path)
    (tmp_path / "short").write_bytes(bytes(10))
    for arguments, message in (
        ([], "1 files of inputs"),
        (["short", "out"], "768 bytes"),
        (["none", "out"], "No such"),
    ):
        done = subprocess.run([program, *arguments], cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode
        assert message in done.stderr


def test_results_may_be_inputs_and_weights(tmp_path: Path) -> None:
    model = Function(lambda self, x: (x, self.weight, x.relu()), weight=torch.randn(4)).eval()
    exported(tmp_path, model, torch.randn(1, 4))
    text = (tmp_path / "net.h").read_text()
    assert "Result 0 of the model: float32[1, 4] in input 0" in text
    assert re.search(r"Result 1 of the model: float32\[4\] in (the weights|output \d)", text)
    x = torch.randn(1, 4)
    found = results(build(tmp_path), (x,), text.count("#define NET_OUTPUT_"))
    assert any(torch.equal(one, x.relu().flatten()) for one in found)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    compiled = sepc.compile(nn.Conv2d(3, 4, 3).eval())
    with pytest.raises(SepcError, match="Nothing is compiled yet"):
        compiled.export(tmp_path)
    compiled.precompile(torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match="cannot be called 'my-net'"):
        compiled.export(tmp_path, name="my-net")
    with pytest.raises(InputError, match="cannot be called 'main'"):
        compiled.export(tmp_path, name="main")
    with pytest.raises(InputError, match="There is no format 'onnx'"):
        compiled.export(tmp_path, format="onnx")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ArtifactError, match="The bundle cannot be written"):
        compiled.export(file)
    on_host = Function(lambda self, x: self.conv(x).topk(2)[0], conv=nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(ModelError, match=r"A bundle has no PyTorch(.|\n)*topk"):
        sepc.compile(on_host, example_inputs=(torch.randn(1, 3, 8, 8),)).export(tmp_path)
