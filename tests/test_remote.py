"""Devices behind TVM's RPC: they compute what the model computes, and what goes wrong with them is told clearly."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import sepc
from sepc.backends import rpc
from sepc.backends.rpc import Board
from sepc.errors import ArtifactError, DeviceError, InputError, ModelError, TargetError
from tests.bundle.test_emulation import needs_tools
from tests.helpers import TOLERANCE, Function
from tests.rpc import HOST, Service, needs_rpc, server, tracker, unused_port

X = torch.randn(1, 3, 20, 18, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish(), nn.Conv2d(16, 16, 3, 1, 1, groups=16)),
        *(nn.Conv2d(16, 10, 1), nn.Flatten(), nn.Softmax(1)),
    ).eval()


def agrees(compiled: sepc.CompiledModel, model: nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(*inputs)
    found = compiled(*inputs)
    assert found.stride() == expected.stride()
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture(scope="module")
def device() -> Iterator[Service]:
    with server() as one:
        yield one


@pytest.fixture
def remote(device: Service) -> Iterator[sepc.Remote]:
    one = sepc.remote(device.address, timeout_s=120)
    yield one
    one.close()


@needs_rpc
@pytest.mark.parametrize("threads", [1, 2])
def test_a_device_computes_what_the_model_computes_and_gets_its_library_once(
    remote: sepc.Remote, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[str] = []
    upload = Board.upload
    monkeypatch.setattr(
        Board, "upload", lambda board, content, file: (uploads.append(file), upload(board, content, file))
    )
    model = network()
    compiled = sepc.compile(model, target="x86-64-v3", num_threads=threads, runner=remote)
    agrees(compiled, model, X)
    agrees(compiled, model, X.flip(2))
    agrees(compiled, model, X.contiguous(memory_format=torch.channels_last))
    assert len([one for one in uploads if one.startswith("model-")]) == 2  # one for each order of the input
    profile = compiled.profile(X, repeats=3)
    assert [row.name for row in profile] == [one.name for one in compiled.regions]
    assert profile.measured_us > 0


@needs_rpc
def test_tensors_of_every_type_and_none_cross_over(remote: sepc.Remote) -> None:
    model = Function(
        lambda self, i, h, b, empty: (self.table(i), h.float().relu(), b.relu(), i.gt(2), empty, h),
        table=nn.Embedding(7, 6),
    ).eval()
    inputs = (torch.tensor([[1, 6, 0]]), torch.randn(3, 5).half(), torch.randn(4).bfloat16(), torch.randn(0, 3))
    found = sepc.compile(model, target="x86-64-v3", num_threads=1, runner=remote)(*inputs)
    with torch.no_grad():
        expected = model(*inputs)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_rpc
def test_a_device_is_described_by_its_own_files(remote: sepc.Remote) -> None:
    target = sepc.Target.parse("x86-64-v3")
    board = remote.board()
    assert board.cpu(target).llvm_cpu == sepc.Target.parse("native").llvm_cpu
    assert board.shell("echo $((6 * 7))", target).strip() == "42"
    with pytest.raises(DeviceError, match=r"command failed(.|\n)*status 3: so it is"):
        board.shell("echo so it is; exit 3", target)
    with pytest.raises(DeviceError, match="status -2"):
        board.shell("yes | head -c 2000000", target)


@needs_rpc
@needs_tools
def test_a_device_of_another_kind_says_what_it_is(remote: sepc.Remote) -> None:
    model = network()
    with pytest.raises(TargetError, match=r"cannot load code for 'arm64'(.|\n)*it is no aarch64"):
        sepc.compile(model, target="arm64", num_threads=1, runner=remote)(X)
    with pytest.raises(TargetError, match=r"cannot run code .* 'x86:diamondrapids'(.|\n)*lacks(.|\n)*target='"):
        sepc.compile(model, target="x86:diamondrapids", num_threads=1, runner=remote)(X)
    agrees(sepc.compile(model, target="x86-64-v3", num_threads=1, runner=remote), model, X)


@needs_rpc
def test_a_device_with_a_session_already_is_busy(device: Service, remote: sepc.Remote) -> None:
    remote.board()
    with pytest.raises(DeviceError, match=r"busy(.|\n)*one session at a time"):
        rpc.connect(HOST, device.port, timeout_s=1.5)
    assert sepc.remote(device.address) is remote


@needs_rpc
def test_a_device_that_is_lost_in_the_middle_of_a_call_is_named_and_another_one_takes_over() -> None:
    model = network()
    with tracker() as one, server(one, "kind") as first, server(one, "kind") as second:
        with pytest.raises(DeviceError, match=r"no free device of the key 'phone'(.|\n)*of these keys: kind"):
            sepc.remote(one.address, key="phone", timeout_s=1).board()
        remote = sepc.remote(one.address, key="kind", timeout_s=120)
        compiled = sepc.compile(model, target="x86-64-v3", num_threads=1, runner=remote)
        agrees(compiled, model, X)
        board, target = remote.board(), compiled.target
        with pytest.raises(DeviceError, match=r"was lost while running a command(.|\n)*not answered for 0.5 s"):
            board.shell("sleep 20", target, timeout_s=0.5)
        board.close()
        agrees(compiled, model, X)  # on the other one
        killer = threading.Timer(1, lambda: (first.kill(), second.kill()))
        killer.start()
        start = time.monotonic()
        with pytest.raises(DeviceError, match=r"was lost while running a command(.|\n)*connection has ended"):
            remote.board().shell("sleep 20", target)
        assert time.monotonic() - start < 15
        killer.join()
        remote.timeout_s = 1
        with pytest.raises(DeviceError, match=r"no free device of the key 'kind'"):
            compiled(X)


def test_where_nothing_listens_that_is_said() -> None:
    compiled = sepc.compile(network(), target="x86-64-v3", runner=sepc.remote(f"{HOST}:{unused_port()}"))
    with pytest.raises(DeviceError, match=r"There is no RPC server(.|\n)*tvm.exec.rpc_server"):
        compiled(X)
    with pytest.raises(DeviceError, match=r"There is no tracker(.|\n)*refused(.|\n)*tvm.exec.rpc_tracker"):
        sepc.remote(f"{HOST}:{unused_port()}", key="rpi").board()
    with pytest.raises(DeviceError, match="There is no RPC server"):
        sepc.remote("nowhere.invalid:9090").board()
    with socket.create_server((HOST, 0)) as silent, pytest.raises(DeviceError, match="busy, or no RPC server"):
        sepc.remote(f"{HOST}:{silent.getsockname()[1]}", timeout_s=0.5).board()


@pytest.mark.parametrize("address", ["rpi", "rpi:", ":9090", "rpi:0", "rpi:99999", "rpi:http"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        sepc.remote(address)


def test_nothing_is_left_to_this_hosts_pytorch_and_nothing_is_saved_for_it(tmp_path: Any) -> None:
    remote = sepc.remote(f"{HOST}:{unused_port()}")
    model = Function(lambda self, x: self.conv(x).topk(2)[0], conv=nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(ModelError, match=r"topk(.|\n)*a device leaves nothing to PyTorch"):
        sepc.compile(model, runner=remote, example_inputs=(X,))
    compiled = sepc.compile(network(), runner=remote, example_inputs=(X,))
    with pytest.raises(ArtifactError, match="cannot be saved"):
        compiled.save(tmp_path / "model.sepc")
    assert repr(remote).startswith("sepc.remote('127.0.0.1:")
