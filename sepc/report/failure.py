"""What is left of a failure inside a pass: all that it takes to look at it, and to repeat it, in one directory."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch.export import ExportedProgram

from sepc.errors import PassError, SepcError, VerificationError
from sepc.frontend.export import Captured
from sepc.passes.observers import Observer

if TYPE_CHECKING:
    from sepc.passes.manager import Pass, PassContext, PassManager, PassRecord

INPUT: Final = "input.pt2"


@dataclass(frozen=True)
class Case:
    """What passes run on, to be had once more.

    Attributes:
        exported: the program. capture: the graph made of it, as it was before the passes ran.
    """

    exported: ExportedProgram
    capture: Callable[[], Captured]


def run_passes(manager: PassManager, captured: Captured, context: PassContext, case: Case) -> list[PassRecord]:
    """What `manager` does to the graph of `captured`.

    Where a pass fails there is a directory, that of the observer that dumps or a new temporary one: with the dump until
    then, so that its last graph is the one before the pass; the traceback; the program in a file; and the command that
    repeats the failure.

    Raises:
        PassError: a pass failed; it names the directory.
    """
    watch = _Watch()
    try:
        return replace(manager, observers=[*manager.observers, watch]).run(captured.graph_module, context)
    except Exception as error:  # Passes are somebody else's programs, too.
        if watch.failed_pass is None:
            raise
        passes = manager.passes[: watch.completed + 1]
        try:
            directory = _keep(error, replace(manager, passes=passes), context, case)
        except OSError as refused:
            fix = f"report it; nothing could be kept of it, as {refused.filename} cannot be written"
        else:
            page = directory / "index.html"
            fix = f"look into {page}, and report it with that directory, whose repeat.sh repeats it"
        raise _told(error, watch.failed_pass, fix) from error


@dataclass
class _Watch(Observer):
    """Which pass failed, and how many did not."""

    completed: int = 0
    failed_pass: Pass | None = None

    def recorded(self, record: PassRecord) -> None:
        """Count it."""
        self.completed += 1

    def failed(self, one: Pass, error: Exception) -> None:
        """Note it."""
        self.failed_pass = one


def _told(error: Exception, failed: Pass, fix: str) -> PassError:
    """The error as the user gets it."""
    if isinstance(error, SepcError):
        kind = VerificationError if isinstance(error, VerificationError) else PassError
        return kind(error.what, where=error.where, why=error.why, fix=f"{error.fix}; {fix}" if error.fix else fix)
    lines = str(error).strip().splitlines() or [""]
    return PassError(f"{failed.name} failed", why=f"{type(error).__name__}: {lines[0]}".rstrip(": "), fix=fix)


def _keep(error: Exception, manager: PassManager, context: PassContext, case: Case) -> Path:
    """Write all that there is of an error in the last pass of `manager`; returns the directory. Raises OSError."""
    from sepc.passes.manager import verification_inputs
    from sepc.report.dump import COMMAND, Dump

    dump = next((one for one in manager.observers if isinstance(one, Dump)), None)
    if dump is None:
        dump = Dump(Path(tempfile.mkdtemp(prefix="sepc-failure-")))
        before = replace(manager, passes=manager.passes[:-1], observers=[dump])
        before.run(case.capture().graph_module, context.without_notes())
        dump.failed(manager.passes[-1], error)
    captured, directory = case.capture(), dump.directory.resolve()
    arguments = captured.arguments(verification_inputs(captured.graph_module, context.example_inputs))
    text = shlex.join(command(directory / INPUT, manager.passes, context, manager.verify_each, directory))
    try:
        _save(case.exported, arguments, directory / INPUT)
    except Exception as refused:  # torch.export cannot write every program that it makes.
        text = f"# The program could not be written: {' '.join(str(refused).split())}"
    title = f"# {manager.passes[-1].name} fails in this; the graph before it is in {dump.latest}."
    path = directory / COMMAND
    path.write_text(f"#!/bin/sh\n{title}\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    dump.write_index()
    return dump.directory


def command(
    program: Path, passes: Sequence[Pass], context: PassContext, verify_each: bool, dump_directory: Path
) -> list[str]:
    """The words of the command that runs `passes` on the exported `program`."""
    from sepc.passes.selection import pass_text

    target = context.target.name if context.target is not None else "native"
    words = ["sepc-opt", str(program), "--passes", ",".join(map(pass_text, passes)), "--target", target]
    words += ["--dtype", context.element.name, "--threads", str(context.threads)]
    return [*words, "--verify-each" if verify_each else "--no-verify-each", f"--dump-ir={dump_directory}"]


def _save(exported: ExportedProgram, arguments: tuple[tuple[object, ...], dict[str, object]], path: Path) -> None:
    """Write a program with these arguments as its example inputs."""
    before = exported.example_inputs
    exported.example_inputs = arguments
    try:
        torch.export.save(exported, path)
    finally:
        exported.example_inputs = before
