"""Many threads, and processes that are forked: results are right, and nobody waits for threads that are not there."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import sepc

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240
START = """
import os, signal, sys, tempfile, numpy, torch, sepc
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(2)
model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
x = torch.randn(1, 3, 64, 64)
fast = sepc.compile(model, num_threads=2)
expected = fast(x)
large = torch.randn(1000, 1000)

def forked(function):
    child = os.fork()
    if not child:
        signal.alarm(60)  # Who waits for ever is killed.
        os._exit(0 if function() else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def run(code: str) -> str:
    """What a fresh process prints that runs `code` after `START`."""
    command = [sys.executable, "-c", START + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_process_runs_on_all_its_threads() -> None:
    run("""
for _ in range(3):
    forked(lambda: torch.equal(fast(x), expected))
    assert torch.equal(fast(x), expected)
""")


def test_pytorch_has_its_threads_in_a_forked_process() -> None:
    run("""
product = large @ large
forked(lambda: torch.equal(large @ large, product) and torch.equal(fast(x), expected))
assert torch.equal(large @ large, product)
""")


def test_a_process_may_be_forked_while_others_call() -> None:
    run("""
import threading
stop = threading.Event()
def calls():
    while not stop.is_set():
        assert torch.equal(fast(x), expected)
threads = [threading.Thread(target=calls) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(5):
    forked(lambda: all(torch.equal(fast(x), expected) for _ in range(5)))
stop.set()
for thread in threads: thread.join()
""")


def test_an_exported_model_runs_in_a_forked_process() -> None:
    run("""
with tempfile.TemporaryDirectory() as path:
    fast.export(path, format="tvm")
    loaded = sepc.load(path)
    for _ in range(3):
        assert numpy.array_equal(loaded(x.numpy()), expected.numpy())
    forked(lambda: all(numpy.array_equal(loaded(x.numpy()), expected.numpy()) for _ in range(3)))
    assert numpy.array_equal(loaded(x.numpy()), expected.numpy())
""")


def test_workers_of_a_data_loader_run_it() -> None:
    run("""
class Data(torch.utils.data.Dataset):
    def __len__(self): return 12
    def __getitem__(self, index): return fast(x + index)[0]
loader = torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2, multiprocessing_context="fork")
wanted = torch.stack([fast(x + index)[0] for index in range(12)])
for _ in range(2):
    assert torch.equal(torch.cat(list(loader)), wanted)
""")


def test_processes_that_are_forked_share_no_arena() -> None:
    run("""
(workspace,) = fast._last().executable._workspaces
arena = workspace.arena
before = arena.clone()
forked(lambda: fast(x + 1) is not None)
assert torch.equal(arena, before)
""")


def test_a_process_that_is_forked_while_one_compiles_compiles_its_own() -> None:
    run("""
import threading
other = sepc.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()).eval(), num_threads=2)
compiling = threading.Thread(target=lambda: other(x))
compiling.start()
forked(lambda: torch.equal(fast(x), expected))
compiling.join()
forked(lambda: other(x).shape == (1, 8, 62, 62))
""")


def test_eight_threads_get_right_results_and_as_many_arenas_as_there_are_calls_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    inputs = [torch.randn(1, 3, 12, 12) for _ in range(8)]
    fast = sepc.compile(model, num_threads=2)
    expected = [fast(x) for x in inputs]

    def calls(index: int) -> bool:
        return all(torch.equal(fast(inputs[index]), expected[index]) for _ in range(100))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(calls, range(8)))
    assert 1 <= len(fast._last().executable._workspaces) <= 8


def test_several_threads_may_compile_models_of_their_own() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 4 + index, 3), nn.ReLU()).eval() for index in range(4)]
    x = torch.randn(1, 3, 8, 8)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda model: sepc.compile(model, num_threads=1)(x), models))
    for model, result in zip(models, found, strict=True):
        torch.testing.assert_close(result, model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_calls() -> None:
    out = run("""
def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
torch.set_num_threads(1)
mixed = sepc.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveMaxPool2d(3)).eval(), num_threads=1)
small = x[..., :10, :10]
for _ in range(1000): mixed(small)  # PyTorch runs a part of it.
before = resident_bytes()
for _ in range(10000): mixed(small)
print(resident_bytes() - before)
""")
    assert int(out) < 1 << 20
