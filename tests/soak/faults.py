"""Trials of what goes wrong around sepc: a call is right or one SepcError, the next one works, and nothing is left."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sepc
from sepc.cache import Cache
from tests.soak import forked
from tests.soak.files import CHANGES
from tests.soak.outcome import Outcome

Fault = Callable[[random.Random, pytest.MonkeyPatch], None]
MODELS_IN_CACHE = 2
MEGABYTE = 1 << 20


def disk_full(generator: random.Random, patch: pytest.MonkeyPatch) -> None:
    """The disk of temporary files has room for little."""
    if not forked.fill_disk(Path(tempfile.gettempdir()), generator.choice([4, 16, 24, 60, 200])):
        no_space(generator, patch)  # Not everybody may mount.


def no_space(generator: random.Random, patch: pytest.MonkeyPatch) -> None:
    """The n-th write of an artefact finds the disk full."""
    left = [generator.randrange(8)]
    import zipfile

    write = zipfile.ZipFile.writestr

    def full(*args: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **options)

    patch.setattr(zipfile.ZipFile, "writestr", full)


def no_files(_: random.Random, __: pytest.MonkeyPatch) -> None:
    """A process may not open more files than it has."""
    most = len(list(Path("/proc/self/fd").iterdir())) + 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def no_temporary_directory(_: random.Random, patch: pytest.MonkeyPatch) -> None:
    """The place for temporary files is not there."""
    patch.setattr(tempfile, "tempdir", "/nonexistent")


def no_compiler(_: random.Random, patch: pytest.MonkeyPatch) -> None:
    """There is no C compiler."""
    patch.setenv("PATH", "/nonexistent")


def broken_compiler(generator: random.Random, patch: pytest.MonkeyPatch) -> None:
    """The C compiler fails, does nothing, or dies."""
    own = Path(tempfile.gettempdir()) / "cc"
    own.write_text(
        "#!/bin/sh\n" + generator.choice(["exit 1", "exit 0", "kill -9 $$", "echo garbage >&2; exit 3"]) + "\n"
    )
    own.chmod(0o700)
    patch.setenv("CC", str(own))


def no_tvm(_: random.Random, patch: pytest.MonkeyPatch) -> None:
    """TVM is not installed."""
    patch.setitem(sys.modules, "tvm", None)


def kernel_fails(generator: random.Random, patch: pytest.MonkeyPatch) -> None:
    """TVM cannot compile some kernels, or any."""
    from sepc.backends import build

    compile_function, share, salt = build.compile_function, generator.choice([0.3, 0.5, 1.0]), generator.random()

    def fail(function: Any, target: Any) -> Any:
        if random.Random(f"{salt} {function.attrs['global_symbol']}").random() < share:
            raise RuntimeError("Check failed: this kernel is beyond me")
        return compile_function(function, target)

    patch.setattr(build, "compile_function", fail)


def cache_not_ours(_: random.Random, __: pytest.MonkeyPatch) -> None:
    """Others may write to the cache."""
    directory = Path(os.environ["SEPC_CACHE_DIR"])
    (directory / "models").mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "models").chmod(0o777)


def cache_read_only(_: random.Random, patch: pytest.MonkeyPatch) -> None:
    """The cache cannot be written to."""
    may = os.access
    patch.setattr(os, "access", lambda path, mode, **how: Path(path).name != "models" and may(path, mode, **how))


FAULTS: tuple[Fault, ...] = (
    *(disk_full, no_space, no_files, no_temporary_directory, no_compiler, broken_compiler),
    *(no_tvm, kernel_fails, cache_not_ours, cache_read_only),
)


def _under(fault: Fault, generator: random.Random) -> int:
    with pytest.MonkeyPatch.context() as patch:
        fault(generator, patch)
        return forked.compile_and_compare()


def faults(number: int, directory: Path) -> Outcome:
    """One fault while a model is compiled; afterwards all is well."""
    outcome, generator = Outcome(), random.Random(number)
    fault = FAULTS[number % len(FAULTS)]
    temporary = _places(directory)
    found = forked.run(lambda: _under(fault, generator))
    outcome.check(found in (forked.RIGHT, forked.REFUSED), f"{fault.__name__} {number}: {found}")
    outcome.counts["faults injected"] += 1
    outcome.counts["faults injected, refused with one error"] += found == forked.REFUSED
    (temporary / "cc").unlink(missing_ok=True)
    left = [path.name for path in temporary.iterdir()]
    outcome.check(not left, f"{fault.__name__} {number} leaves {left}")
    if (models := directory / "cache" / "models").exists():
        models.chmod(0o700)
    again = forked.run(forked.compile_and_compare)
    outcome.check(again == forked.RIGHT, f"after {fault.__name__} {number}: {again}")
    _check_cache(outcome, f"after {fault.__name__} {number}")
    return outcome


def out_of_memory(number: int, directory: Path) -> Outcome:
    """The system refuses the memory of a call; the next call, with more of it, is right."""
    outcome = Outcome()
    _places(directory)

    def call() -> int:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.MaxPool2d(2)).eval()
        x = torch.randn(1, 3, 512 + 64 * (number % 4), 512)
        compiled = sepc.compile(model, num_threads=1, example_inputs=(x,))
        now = forked.pages()[0] * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + 4 * MEGABYTE, before[1]))
        try:
            compiled(x)
            return forked.FAILED  # There was memory enough.
        except sepc.OutOfMemoryError:
            resource.setrlimit(resource.RLIMIT_AS, before)
        right = torch.allclose(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-4)
        return forked.RIGHT if right else forked.WRONG

    found = forked.run(call)
    outcome.check(found == forked.RIGHT, f"out of memory {number}: {found}")
    outcome.counts["faults injected"] += 1
    outcome.counts["faults injected, refused with one error"] += 1
    return outcome


def killed(number: int, directory: Path) -> Outcome:
    """A process that compiles is killed at any moment; the next one works, and tidies the cache up."""
    outcome, generator = Outcome(), random.Random(number)
    _places(directory)
    for _ in range(3):
        child = forked.start(forked.compile_and_compare)
        found = forked.kill_after(child, generator.uniform(0.0, 6.0))
        outcome.check(found in (forked.RIGHT, -signal.SIGKILL), f"to be killed {number}: {found}")
        outcome.counts["faults injected"] += 1
        again = forked.run(forked.compile_and_compare)
        outcome.check(again == forked.RIGHT, f"after a kill {number}: {again}")
        names = [path.name for path in (directory / "cache" / "models").iterdir()]
        outcome.check(all(name.endswith(".sepc") for name in names), f"after a kill {number} there are {names}")
        _check_cache(outcome, f"after a kill {number}")
        for path in (directory / "cache" / "models").iterdir():
            path.unlink()
    return outcome


def cache(number: int, directory: Path) -> Outcome:
    """Several processes at once on a cache whose entries somebody changes: all right, and no entry is lost."""
    outcome, generator = Outcome(), random.Random(number)
    _places(directory)
    for which in range(MODELS_IN_CACHE):
        outcome.check(forked.run(lambda which=which: forked.compile_and_compare(which)) == forked.RIGHT, "first")
    models = directory / "cache" / "models"
    for _ in range(3):
        entries = sorted(models.glob("*.sepc"))
        outcome.counts["entries lost"] += max(0, MODELS_IN_CACHE - len(entries))
        victim = generator.choice(entries)
        if generator.random() < 0.2:
            victim.write_bytes(next(one for one in entries if one != victim).read_bytes())
        else:
            victim.write_bytes(bytes(generator.choice(CHANGES)(bytearray(victim.read_bytes()), generator)))
        outcome.counts["damaged cache entries"] += 1
        children = [forked.start(lambda which=which: forked.compile_and_compare(which % 2)) for which in range(4)]
        found = [forked.wait(child) for child in children]
        outcome.check(found == [forked.RIGHT] * 4, f"with a damaged entry {number}: {found}")
        outcome.counts["processes that share a cache"] += 4
    _check_cache(outcome, f"cache {number}")
    outcome.counts["entries lost"] += max(0, MODELS_IN_CACHE - len(list(models.glob("*.sepc"))))
    return outcome


def _places(directory: Path) -> Path:
    """Have processes that are forked use this directory; returns that of temporary files."""
    temporary = directory / "temporary"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    os.environ.update(SEPC_CACHE="1", SEPC_CACHE_DIR=str(directory / "cache"), TMPDIR=str(temporary))
    return temporary


def _check_cache(outcome: Outcome, when: str) -> None:
    cache_of_trial = Cache(Path(os.environ["SEPC_CACHE_DIR"]) / "models")
    for entry in cache_of_trial.entries():
        try:
            cache_of_trial.verify(entry)
        except sepc.ArtifactError as error:
            outcome.check(False, f"{when} an entry is damaged: {error.why}")
