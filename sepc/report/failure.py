"""What is left of a failure inside a pass: all that it takes to look at it, and to repeat it, in one directory."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch.export import ExportedProgram

from sepc.errors import PassError, SepcError, VerificationError
from sepc.frontend.export import Captured

if TYPE_CHECKING:
    from sepc.passes.manager import Pass, PassContext, PassManager, PassRecord
    from sepc.report.dump import Dump

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
    from sepc.report.dump import Dump

    dump = next((one for one in manager.observers if isinstance(one, Dump)), None)
    try:
        return manager.run(captured.graph_module, context)
    except Exception as error:  # Passes are somebody else's programs, too.
        if dump is None:
            dump = Dump(Path(tempfile.mkdtemp(prefix="sepc-failure-")))
            with suppress(Exception):  # As it did above.
                again = replace(context, notes=[], _known=set())
                replace(manager, observers=[dump]).run(case.capture().graph_module, again)
        if dump.failed_pass is None:
            raise
        _write_command(dump, dump.failed_pass, manager, context, case)
        raise _told(error, dump, dump.failed_pass) from error


def _told(error: Exception, dump: Dump, failed: Pass) -> PassError:
    """The error as the user gets it."""
    fix = f"look into {dump.directory / 'index.html'}, and report it with that directory, whose repeat.sh repeats it"
    if isinstance(error, SepcError):
        kind = VerificationError if isinstance(error, VerificationError) else PassError
        return kind(error.what, where=error.where, why=error.why, fix=f"{error.fix}; {fix}" if error.fix else fix)
    lines = str(error).strip().splitlines() or [""]
    return PassError(f"{failed.name} failed", why=f"{type(error).__name__}: {lines[0]}".rstrip(": "), fix=fix)


def _write_command(dump: Dump, failed: Pass, manager: PassManager, context: PassContext, case: Case) -> None:
    """Write the program and a script that runs the passes on it until the one that failed."""
    from sepc.passes.manager import verification_inputs
    from sepc.report.dump import COMMAND

    directory = dump.directory.resolve()
    captured = case.capture()
    tensors = verification_inputs(captured.graph_module, context.example_inputs)
    passes = manager.passes[: dump.completed + 1]
    text = shlex.join(command(directory / INPUT, passes, context, manager.verify_each, directory))
    try:
        _save(case.exported, captured.arguments(tensors), directory / INPUT)
    except Exception as error:  # torch.export cannot write every program that it makes.
        text = f"# The program could not be written: {' '.join(str(error).split())}"
    path = directory / COMMAND
    path.write_text(f"#!/bin/sh\n# {failed.name} fails in this; the graph before it is in {dump.latest}.\n{text}\n")
    path.chmod(0o755)
    dump.write_index()


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
