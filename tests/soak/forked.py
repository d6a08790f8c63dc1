"""Things that are tried in a process of their own, forked from this one, which compiles nothing itself."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import sepc
import sepc.cache
from sepc import cache_key
from tests.helpers import TOLERANCE

RIGHT, WRONG, REFUSED, FAILED = range(4)
LONGEST_S = 300


def pages() -> tuple[int, int]:
    """How many pages of memory this process has asked for, and how many it has."""
    total, resident, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return total, resident


def small_model(number: int = 0) -> nn.Module:
    """A model of three regions or so; another one for each number."""
    torch.manual_seed(number)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.GELU(), nn.AdaptiveMaxPool2d(3)]
    return nn.Sequential(*layers).eval()


def small_input() -> torch.Tensor:
    """What it is for."""
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def compile_and_compare(number: int = 0) -> int:
    """Compile a small model and run it; RIGHT, WRONG, or REFUSED if that is a SepcError."""
    sepc.cache.read_sources_digest = lambda: cache_key.SOURCES_DIGEST  # Others may edit sepc meanwhile.
    model, x = small_model(number), small_input()
    try:
        result = sepc.compile(model, num_threads=1)(x)
    except sepc.SepcError:
        return REFUSED
    reference = model(x).detach()
    return RIGHT if bool((result - reference).abs().max() <= TOLERANCE * reference.abs().max()) else WRONG


def fill_disk(place: Path, kilobytes: int) -> bool:
    """Put a disk with room for so much in the place of a directory, for this process alone, which has to be a forked
    one; tells whether that is allowed.
    """
    new_mount_namespace, all_private = 0x20000, 0x44000
    libc, size = ctypes.CDLL(None), f"size={kilobytes}k".encode()
    return not (
        libc.unshare(new_mount_namespace)
        or libc.mount(b"none", b"/", None, all_private, None)
        or libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, size)
    )


def start(function: Callable[[], int]) -> int:
    """Run `function` in a forked process, which exits with what that returns; its number."""
    child = os.fork()
    if child:
        return child
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(LONGEST_S)
    status = FAILED
    try:
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """What a forked process returned, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(function: Callable[[], int]) -> int:
    """What `function` returns in a forked process."""
    return wait(start(function))


def kill_after(child: int, seconds: float) -> int:
    """End a forked process when so long has passed, if it has not ended before; as `wait`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return wait(child)
