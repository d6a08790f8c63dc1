"""``sepc-opt``: run the passes on a model, look at the graph anywhere between them, and at what it is compiled to.

sepc-opt timm:mobilenetv2_100 --dump-ir
sepc-opt model.pt2 --passes canonicalize,fold-batch-norm --diff
sepc-opt net.py:make --target arm64 --emit asm -o net.s
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sepc.cli import MODEL_FORMS, Parser
from sepc.cli.emit import FORMS
from sepc.errors import InputError, SepcError, require_known

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from sepc.cli.models import Given
    from sepc.compiled import CompiledModel
    from sepc.frontend.export import Captured
    from sepc.passes.manager import Pass, PassContext, PassManager, PassRecord
    from sepc.passes.observers import Observer
    from sepc.target import Target

DUMP_DIRECTORY: Final = "sepc-ir"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 1 after an error that is told on standard error."""
    options = parser().parse_args(arguments)
    try:
        if options.list_passes:
            print(list_passes())
        elif options.model is None:
            raise InputError("No model is given", where="MODEL", fix=f"give {MODEL_FORMS}")
        else:
            _run(options)
    except SepcError as error:
        print(f"sepc-opt: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # The reader, such as `head`, has seen enough.
        sys.stderr.close()
    except OSError as error:
        print(f"sepc-opt: {error.filename or 'A file'} cannot be written: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="sepc-opt", description=(__doc__ or "").partition(":\n")[0].replace("``", ""))
    made.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_FORMS)
    made.add_argument("--input", action="append", default=[], metavar="SHAPE[:TYPE]", help="1x3x224x224; repeatable")
    made.add_argument("--target", default="native", help="what to compile for (default: %(default)s)")
    made.add_argument("--dtype", default="float32", help="the type in which kernels compute (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="threads per call (default: %(default)s)")
    passes = made.add_argument_group("passes")
    passes.add_argument("--passes", metavar="A,B{K=V}", help="these, on the canonical graph, instead of all")
    passes.add_argument("--stop-after", metavar="PASS", help="leave out the passes behind this one")
    passes.add_argument("--list-passes", action="store_true", help="name all passes and what they do")
    passes.add_argument("--verify-each", action=argparse.BooleanOptionalAction, default=True, help="compare results")
    passes.add_argument("--timing", action="store_true", help="print how long each pass took")
    passes.add_argument("--statistics", action="store_true", help="print what each pass decided, and why")
    shown = made.add_argument_group("the graph between passes")
    shown.add_argument(
        *("--dump-ir",), nargs="?", type=Path, const=Path(DUMP_DIRECTORY), metavar="DIR", help="write it, and pictures"
    )
    shown.add_argument("--print-ir-before", action="append", default=[], metavar="PASS")
    shown.add_argument("--print-ir-after", action="append", default=[], metavar="PASS")
    shown.add_argument("--print-ir-after-all", action="store_true")
    shown.add_argument("--print-ir-after-change", action="store_true")
    shown.add_argument("--print-ir-after-failure", action="store_true")
    shown.add_argument("--diff", action="store_true", help="print what each pass changed")
    result = made.add_argument_group("the result")
    result.add_argument("--emit", choices=list(FORMS), help="what to write (default: ir)")
    result.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: standard output)")
    return made


def list_passes() -> str:
    """A line for each pass, those of the pipeline first: its name and what its documentation begins with."""
    from sepc.passes import registry

    names = registry.names()
    width = max(map(len, names))
    texts = {name: sys.modules[registry.pass_class(name).__module__].__doc__ or "" for name in names}
    titles = {name: text.partition("\n")[0].removeprefix(f"{name}: ") for name, text in texts.items()}
    return "\n".join(f"{name:{width}}  {title}" for name, title in titles.items())


def _run(options: argparse.Namespace) -> None:
    # Imported late: `--help` and a wrong option need none of it, and PyTorch takes seconds.
    from sepc.cli.models import load
    from sepc.target import Target

    target = Target.parse(options.target).computing_in(options.dtype)
    passes, observers = _passes(options), _observers(options)
    name = options.emit or ("" if observers or options.timing or options.statistics else "ir")
    form = FORMS.get(name)
    if form is not None:
        form.require_file(name, options.output)
    is_compiled = form is not None and form.of == "compiled"
    if is_compiled and (options.passes or options.stop_after):
        why = f"'{name}' is made by all passes"
        raise InputError(f"--emit={name} does not go with a choice of passes", why=why, fix="leave out either")
    given = load(options.model, options.input)
    if not is_compiled or observers or options.timing or options.statistics:
        captured = _optimize(given, target, passes, observers, options)
    if form is not None:
        form.write(_compile(given, target, options) if is_compiled else captured, given, options.output)


def _passes(options: argparse.Namespace) -> tuple[Pass, ...]:
    """The passes to run and to show, in order."""
    from sepc.passes import registry
    from sepc.passes.pipeline import pipeline
    from sepc.passes.selection import parse_passes

    passes = pipeline("time") if options.passes is None else parse_passes(options.passes)
    names = [one.name for one in passes]
    for name in (*options.print_ir_before, *options.print_ir_after):
        require_known(name, registry.names(), "pass")
    if options.stop_after is None:
        return passes
    require_known(options.stop_after, names, "pass to stop after")
    return passes[: names.index(options.stop_after) + 1]


def _observers(options: argparse.Namespace) -> list[Observer]:
    from sepc.passes.observers import ALL, PrintDifferences, PrintIR
    from sepc.report.dump import Dump

    observers: list[Observer] = []
    if options.dump_ir is not None:
        observers.append(Dump(options.dump_ir))
    every = options.print_ir_after_all or options.print_ir_after_change
    after = frozenset([*options.print_ir_after, *([ALL] if every else [])])
    changes_only = options.print_ir_after_change and not options.print_ir_after_all
    if after or options.print_ir_before or options.print_ir_after_failure:
        before, failing = frozenset(options.print_ir_before), options.print_ir_after_failure
        observers.append(PrintIR(print, before, after, changes_only, failing))
    if options.diff:
        observers.append(PrintDifferences(sys.stdout.write))
    return observers


def _optimize(
    given: Given, target: Target, passes: Sequence[Pass], observers: Sequence[Observer], options: argparse.Namespace
) -> Captured:
    """The graph after `passes`, with what `options` want to be printed of them."""
    from sepc.frontend.export import export
    from sepc.passes.manager import PassContext, PassManager
    from sepc.report.dump import INDEX
    from sepc.report.failure import Case, run_passes

    start = _Start(export(given.model, given.inputs, given.kwargs), given, _spelling(passes, options))
    context = PassContext(target, target.planned_for, options.threads, target.element)
    captured = start.captured(context)
    context.example_inputs = tuple(captured.flatten(given.inputs, given.kwargs))
    manager = PassManager(passes, options.verify_each, observers)
    case = Case(start.exported, lambda: start.captured(context.without_notes()))
    records = run_passes(manager, captured, context, case)
    if options.dump_ir is not None:
        print(f"Written: {options.dump_ir / INDEX}", file=sys.stderr)
    if options.timing:
        print(timing(records))
    if options.statistics:
        print(statistics(records))
    return captured


def _spelling(passes: Sequence[Pass], options: argparse.Namespace) -> PassManager:
    """What has to run, unseen, before passes that somebody chose: they know one spelling of each operation only."""
    from sepc.passes.manager import PassManager
    from sepc.passes.pipeline import SPELLING

    names = {one.name for one in SPELLING}
    is_needed = options.passes is not None and not names & {one.name for one in passes}
    return PassManager(SPELLING if is_needed else (), options.verify_each)


@dataclass(frozen=True)
class _Start:
    """Where passes start: the program, and what is done to its graph before."""

    exported: ExportedProgram
    given: Given
    spelling: PassManager

    def captured(self, context: PassContext) -> Captured:
        """A new graph."""
        from sepc.frontend.arguments import captured_for
        from sepc.report.failure import Case, run_passes

        def capture() -> Captured:
            return captured_for(self.exported, self.given.signature)[0]

        captured = capture()
        run_passes(self.spelling, captured, context, Case(self.exported, capture))
        return captured


def timing(records: Sequence[PassRecord]) -> str:
    """A table of the passes: time, nodes before and after, and by how much results moved."""
    width = max([len(one.name) for one in records], default=4)
    lines = [f"{'pass':{width}}  {'ms':>9}  {'nodes':>13}  difference"]
    for one in records:
        nodes = f"{one.nodes_before} → {one.nodes_after}" if one.changed else str(one.nodes_after)
        difference = "" if one.max_difference is None else f"{one.max_difference:.1e}"
        lines.append(f"{one.name:{width}}  {one.time_ms:9.1f}  {nodes:>13}  {difference}".rstrip())
    return "\n".join([*lines, f"{'total':{width}}  {sum(one.time_ms for one in records):9.1f}"])


def statistics(records: Sequence[PassRecord]) -> str:
    """What the passes decided: how often each did something, or for which reason it did not."""
    lines: list[str] = []
    for one in records:
        counts: dict[str, int] = {}
        for note in one.notes:
            text = f"{'taken' if note.taken else 'rejected'}: {note.message}"
            counts[text] = counts.get(text, 0) + 1
        lines += [one.name, *(f"  {count:4} × {text}" for text, count in counts.items())] if counts else []
    return "\n".join(lines)


def _compile(given: Given, target: Target, options: argparse.Namespace) -> CompiledModel:
    import sepc

    compiled = sepc.compile(given.model, target=target, num_threads=options.threads)
    compiled.precompile(*given.inputs, **given.kwargs)
    return compiled


if __name__ == "__main__":
    sys.exit(main())
