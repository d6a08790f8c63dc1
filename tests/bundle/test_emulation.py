"""64-bit Arm under emulation: kernels of every kind agree with eager, and missing tools are named."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import sepc
from sepc.bundle import emulation
from sepc.errors import ArtifactError, ModelError, TargetError
from sepc.target import Target
from tests.helpers import TOLERANCE, Function

TOOLS = ("qemu-aarch64-static", "aarch64-linux-gnu-gcc")
# Continuous integration installs them.
needs_tools = pytest.mark.skipif(
    not os.environ.get("CI") and not all(map(shutil.which, TOOLS)), reason=f"needs {' and '.join(TOOLS)}"
)


def check(model: nn.Module, *inputs: torch.Tensor, target: str = "arm64", threads: int = 1) -> sepc.CompiledModel:
    compiled = sepc.compile(model.eval(), target=target, num_threads=threads)
    found = pytree.tree_leaves(compiled(*inputs))
    with torch.no_grad():
        for actual, expected in zip(found, pytree.tree_leaves(model(*inputs)), strict=True):
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            assert (actual.float() - expected.float()).abs().max() <= TOLERANCE * expected.float().abs().max()
    return compiled


def block(channels: int, expanded: int, activation: type[nn.Module] = nn.ReLU6) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, expanded, 1), nn.BatchNorm2d(expanded), activation()),
        *(nn.Conv2d(expanded, expanded, 3, 1, 1, groups=expanded), nn.BatchNorm2d(expanded), activation()),
        *(nn.Conv2d(expanded, channels, 1), nn.BatchNorm2d(channels)),
    )


@needs_tools
@pytest.mark.parametrize(("target", "threads"), [("arm64", 1), ("arm64:cortex-a76", 2), ("arm64:apple-m1", 3)])
def test_a_network_agrees_with_eager(target: str, threads: int) -> None:
    torch.manual_seed(0)
    model = Function(
        lambda self, x: self.head((y := self.stem(x)) + self.block(y)),
        stem=nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.Hardswish()),
        block=block(24, 72),
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10), nn.Softmax(-1)),
    )
    compiled = check(model, torch.randn(2, 3, 37, 35), target=target, threads=threads)
    assert {one.kernel for one in compiled.regions} == {"sepc"}


@needs_tools
def test_stages_of_every_kind_agree_with_eager() -> None:
    torch.manual_seed(0)
    layers = {
        "tiles": nn.Conv2d(32, 32, 3, padding=1),
        "grouped": nn.Conv2d(32, 24, 3, 2, 1, groups=4),
        "long": nn.Conv1d(10, 10, 31, padding=15, groups=10),
        "transposed": nn.ConvTranspose2d(32, 9, 4, 2, 1),
        "volume": nn.Conv3d(4, 6, 3, padding=1),
        "norm": nn.LayerNorm(32),
        "product": nn.Linear(256, 256),
    }
    inputs = (torch.randn(1, 32, 20, 18), torch.randn(1, 10, 77), torch.randn(1, 4, 5, 6, 7), torch.randn(150, 256))
    model = Function(
        lambda self, x, line, volume, rows: (
            *(self.tiles(x).relu(), self.grouped(x), self.transposed(x), self.norm(x.movedim(1, 3)).exp().sigmoid()),
            *(self.long(line), self.volume(volume), self.product(rows), nn.functional.gelu(x), x.amax((2, 3))),
            *(nn.functional.max_pool2d(x, 3, 2), nn.functional.interpolate(x, scale_factor=2.0), rows.softmax(1)),
        ),
        **layers,
    )
    check(model, *inputs)


@needs_tools
def test_types_of_arguments_survive() -> None:
    model = Function(lambda self, i, h: (self.table(i), h.float().relu()), table=nn.Embedding(7, 6))
    check(model, torch.tensor([[1, 6, 0]]), torch.randn(3, 5).half())


@needs_tools
def test_tensors_without_elements_are_passed_through() -> None:
    x, empty = torch.randn(2, 5), torch.randn(0, 3)
    compiled = sepc.compile(Function(lambda self, x, empty: (x.relu(), empty)).eval(), target="arm64")
    positive, same = compiled(x, empty)
    assert torch.equal(positive, x.relu())
    assert same.shape == (0, 3)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = sepc.compile(nn.Conv2d(3, 4, 3).eval(), target="arm64")
    monkeypatch.setattr(emulation.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match=r"qemu-aarch64-static is not installed(.|\n)*gcc-aarch64-linux-gnu"):
        compiled(torch.randn(1, 3, 8, 8))
    monkeypatch.setattr(emulation.shutil, "which", lambda name: name if name.startswith("qemu") else None)
    with pytest.raises(TargetError, match="aarch64-linux-gnu-gcc is not installed"):
        compiled(torch.randn(1, 3, 8, 8))


def test_another_architecture_is_compiled_and_looked_into_but_not_saved(tmp_path: Path) -> None:
    compiled = sepc.compile(nn.Conv2d(3, 8, 3).eval(), target="arm64", example_inputs=(torch.randn(1, 3, 8, 8),))
    convolution = next(one for one in compiled.regions if one.kind == "convolution")
    assert "fmla" in compiled.source(convolution, "asm")
    assert str(compiled.explain()).splitlines()[0].startswith("Conv2d compiled for arm64 (generic)")
    with pytest.raises(ArtifactError, match="cannot be saved on this host"):
        compiled.save(tmp_path / "model.sepc")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TargetError, match="the aarch64 architecture"):
        compiled.profile(torch.randn(1, 3, 8, 8))


def test_nothing_is_left_to_the_hosts_pytorch() -> None:
    model = Function(lambda self, x: self.conv(x).topk(2)[0], conv=nn.Conv2d(3, 4, 3)).eval()
    told = r"aten.topk.default \(.*\): .*\.py:\d+(.|\n)*'arm64', which this host cannot run, leaves nothing"
    with pytest.raises(ModelError, match=told):
        sepc.compile(model, target="arm64", example_inputs=(torch.randn(1, 3, 8, 8),))


def test_plans_differ_with_the_machine() -> None:
    """A Cortex-A72 has a megabyte of cache behind the first level and nothing behind that, a server has more."""
    model, x = block(24, 144), torch.randn(1, 24, 56, 56)
    plans = []
    for name in ("arm64:cortex-a72", "arm64:neoverse-v1"):
        compiled = sepc.compile(model.eval(), target=Target.parse(name), num_threads=1, example_inputs=(x,))
        plans.append([one.tiling for one in compiled.regions])
    assert plans[0] != plans[1]


@needs_tools
@pytest.mark.parametrize(("dtype", "c_type"), [(torch.float32, "float"), (torch.float16, "uint16_t")], ids=str)
def test_a_bundle_in_float16_takes_and_gives_the_models_types(dtype: torch.dtype, c_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = block(24, 72).eval().to(dtype), torch.randn(1, 24, 12, 12).to(dtype)
    options = {"target": "arm64:cortex-a76", "num_threads": 1, "example_inputs": (x,)}
    sepc.compile(model, dtype="float16", **options).export(tmp_path)
    header, readme = ((tmp_path / name).read_text() for name in ("model.h", "README.md"))
    assert "arm64:cortex-a76 in float16" in header
    assert f"const {c_type}* input_0, {c_type}* output_0" in readme
    assert f"{str(dtype).removeprefix('torch.')}[1, 24, 12, 12]" in header
    parameters = sum(one.numel() for one in model.parameters())
    assert (tmp_path / "weights.bin").stat().st_size < 2 * parameters + 4096
    sources = ["main.c", "model.c", "weights.S", "kernels.o"]
    command = [TOOLS[1], "-std=c11", "-Wall", "-Wextra", "-Werror", "-static", "-I.", "-o", "model", *sources, "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "x").write_bytes(x.numpy().tobytes())
    subprocess.run([TOOLS[0], "model", "x", "y"], cwd=tmp_path, check=True)
    found = torch.from_numpy(np.fromfile(tmp_path / "y", x.numpy().dtype)).reshape(x.shape)
    with torch.no_grad():
        expected = model.float()(x.float())
    assert (found.float() - expected).abs().max() <= 5e-3 * expected.abs().max()


@needs_tools
def test_what_tvm_lowers_agrees_with_eager() -> None:
    """On this host such kernels are compared with PyTorch when they are built, for another one nowhere but here."""
    torch.manual_seed(0)
    model = Function(
        lambda self, x, rows: (
            *(
                torch.roll(x, (1, 2), (2, 3)),
                x.cumsum(1),
                x.sin() * x.pow(3),
                x.flip(3),
                rows.argmax(1),
                rows.logsumexp(1),
            ),
            *(nn.functional.pad(x, (1, 2, 3, 0), mode="reflect"), nn.functional.pixel_shuffle(x, 2)),
            nn.functional.interpolate(x, size=(9, 13), mode="bilinear", align_corners=False),
            torch.where(x > 0, x, x.exp()).to(torch.float16),
        )
    )
    compiled = check(model, torch.randn(2, 4, 7, 9), torch.randn(5, 33), target="arm64")
    assert {one.kernel for one in compiled.regions if one.ops} & {"tvm"}
    assert sum(one.kernel == "tvm" for one in compiled.regions) >= 6
