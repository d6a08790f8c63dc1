"""``sepc-opt``: run the passes on a model, look at the graph anywhere between them, and at what it is compiled to.

sepc-opt timm:mobilenetv2_100 --dump-ir
sepc-opt model.pt2 --passes canonicalize,fold-batch-norm --diff
sepc-opt net.py:make --target arm64 --emit asm -o net.s
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from sepc.cli import MODEL_FORMS
from sepc.errors import InputError, SepcError, did_you_mean, require_known

if TYPE_CHECKING:
    from torch import fx

    from sepc.cli.models import Given
    from sepc.compiled import CompiledModel, SourceForm
    from sepc.passes.manager import Pass, PassRecord
    from sepc.passes.observers import Observer
    from sepc.target import Target

GRAPHS: Final = ("ir", "dot", "svg")
KERNELS: Final[tuple[SourceForm, ...]] = ("tirx", "llvm", "asm")
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
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = _Parser(prog="sepc-opt", description=(__doc__ or "").partition(":\n")[0].replace("``", ""))
    made.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_FORMS)
    made.add_argument("--input", action="append", default=[], metavar="SHAPE[:TYPE]", help="1x3x224x224; repeatable")
    made.add_argument("--target", default="native", help="what to compile for (default: %(default)s)")
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
    result.add_argument("--emit", choices=(*GRAPHS, *KERNELS, "report"), help="what to write (default: ir)")
    result.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: standard output)")
    return made


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for an option that it does not know."""

    def error(self, message: str) -> NoReturn:
        """Print `message`, and leave with status 2."""
        start = "unrecognized arguments: "
        if message.startswith(start):
            option = message.removeprefix(start).split()[0].partition("=")[0]
            known = self._option_string_actions
            message += "; " + (did_you_mean(option, known) or f"known are {', '.join(known)}")
        super().error(message)


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

    target = Target.parse(options.target)
    passes, observers = _passes(options), _observers(options)
    given = load(options.model, options.input)
    emit = options.emit or ("" if observers or options.timing or options.statistics else "ir")
    if emit in (*KERNELS, "report"):
        if emit == "report" and options.output is None:
            raise InputError("A report needs a file", where="--emit=report", fix="give it with -o report.html")
        if options.passes or options.stop_after:
            why = f"'{emit}' is made by all passes"
            raise InputError(f"--emit={emit} does not go with a choice of passes", why=why, fix="leave out either")
        if observers or options.timing or options.statistics:
            _optimize(given, target, passes, observers, options)
        _emit_compiled(given, target, emit, options)
        return
    graph_module = _optimize(given, target, passes, observers, options)
    if emit:
        _emit_graph(graph_module, emit, options.output)


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
    from sepc.passes.observers import ALL, Dump, PrintDifferences, PrintIR

    observers: list[Observer] = []
    if options.dump_ir is not None:
        observers.append(Dump(options.dump_ir, _draw))
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
) -> fx.GraphModule:
    from sepc.frontend.export import capture
    from sepc.passes.manager import PassContext, PassManager
    from sepc.passes.pipeline import SPELLING

    captured = capture(given.model, given.inputs)
    context = PassContext(
        target=target,
        machine=target.planned_for,
        threads=options.threads,
        element=target.element,
        example_inputs=tuple(captured.flatten(given.inputs, {})),
    )
    if options.passes is not None and not {one.name for one in passes} & {one.name for one in SPELLING}:
        # All other passes know one spelling of each operation only.
        PassManager(SPELLING, options.verify_each).run(captured.graph_module, context)
    records = PassManager(passes, options.verify_each, observers).run(captured.graph_module, context)
    if options.dump_ir is not None:
        print(f"Written: {options.dump_ir}", file=sys.stderr)
    if options.timing:
        print(timing(records))
    if options.statistics:
        print(statistics(records))
    return captured.graph_module


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


def _emit_graph(graph_module: fx.GraphModule, emit: str, output: Path | None) -> None:
    from sepc.ir.printer import print_graph

    if emit == "ir":
        _write(print_graph(graph_module), output)
        return
    from sepc.report.dot import graph_to_dot

    digraph = graph_to_dot(graph_module)
    _write(digraph.source if emit == "dot" else digraph.pipe(format="svg", encoding="utf-8"), output)


def _emit_compiled(given: Given, target: Target, emit: str, options: argparse.Namespace) -> None:
    import sepc

    compiled: CompiledModel = sepc.compile(
        given.model, target=target, num_threads=options.threads, example_inputs=given.inputs
    )
    if emit == "report":
        compiled.explain(*given.inputs).to_html(options.output)
        return
    form: SourceForm = next(one for one in KERNELS if one == emit)
    comment = ";" if form == "llvm" else "#"
    regions = [one.name for one in compiled.regions if one.symbols]
    _write("\n".join(f"{comment} {name}\n{compiled.source(name, form)}" for name in regions), options.output)


def _draw(graph_module: fx.GraphModule, path: Path) -> None:
    from sepc.report.dot import graph_to_dot

    path.write_text(graph_to_dot(graph_module).source, encoding="utf-8")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
