"""An explanation as text, to be read in 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final

from sepc.report.explanation import WHO, Explanation, RegionExplanation, Total
from sepc.report.words import bytes_text, flops_text, percent, short_op, short_sources

if TYPE_CHECKING:
    from sepc.passes.manager import Note

WIDTH: Final = 120
_INDENT: Final = " " * 6


def text(explanation: Explanation) -> str:
    """All of an explanation, in lines of at most `WIDTH` characters."""
    parts = [_head(explanation), _totals(explanation), _regions(explanation.regions)]
    parts += [_decisions(explanation)]
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in parts)


def _head(explanation: Explanation) -> list[str]:
    threads = f"{explanation.threads} thread{'s' * (explanation.threads != 1)}"
    compiled = f"{explanation.model} compiled for {explanation.target}, {threads}"
    return textwrap.wrap(
        f"{compiled}, least {explanation.optimize}; arena {bytes_text(explanation.arena_bytes)}", WIDTH
    )


def _totals(explanation: Explanation) -> list[str]:
    whole = explanation.total
    rows = [(WHO[kernel], total) for kernel, total in explanation.by_kernel.items()]
    lines = [f"{'Computed by':12}  {'regions':>7}  {'FLOPs':>9}  {'':>7}  {'bytes':>9}  {'':>7}  {'predicted':>12}"]
    lines += [_total(who, total, whole) for who, total in [*rows, ("all", whole)]]
    lines.append("FLOPs are those of convolutions and matrix products; bytes: inputs, weights and results, once.")
    unpredicted = sum(not one.bottleneck for one in explanation.regions)
    if unpredicted:
        lines.append(f"There is no prediction for {unpredicted} of the {whole.regions} regions.")
    bounds = ", ".join(
        f"{name} {time_us:.1f} µs ({percent(time_us, whole.predicted_us)})"
        for name, time_us in explanation.us_by_bottleneck.items()
    )
    return [*lines, *textwrap.wrap(f"Predicted time by bottleneck: {bounds or 'none'}", WIDTH)]


def _total(who: str, total: Total, whole: Total) -> str:
    flops = f"{flops_text(total.flops):>9}  {percent(total.flops, whole.flops):>7}"
    moved = f"{bytes_text(total.bytes_moved):>9}  {percent(total.bytes_moved, whole.bytes_moved):>7}"
    return f"{who:12}  {total.regions:7}  {flops}  {moved}  {total.predicted_us:9.1f} µs"


def _regions(regions: Sequence[RegionExplanation]) -> list[str]:
    width = min(44, max([len(one.name) for one in regions] + [len("region")]))
    columns = f"{'by':7}  {'predicted':>12}  {'bottleneck':10}  {'FLOPs':>9}  {'bytes':>9}"
    lines = [f"{'Region':{width}}  {columns}"]
    for one in regions:
        time = f"{one.predicted_us:9.1f} µs" if one.bottleneck else "–"
        figures = (
            f"{time:>12}  {one.bottleneck or '–':10}  {flops_text(one.flops):>9}  {bytes_text(one.bytes_moved):>9}"
        )
        name = textwrap.shorten(one.name, width, placeholder="…") if len(one.name) > width else one.name
        lines.append(f"{name:{width}}  {WHO.get(one.kernel, one.kernel):7}  {figures}")
        lines += _below(", ".join(map(short_op, one.ops)))
        lines += _below(one.tiling)
        lines += _below("; ".join(map(str, one.resources)))
        lines += _below(f"not a kernel of ours: {one.reason}" if one.reason else "")
        lines += _below(short_sources(one.sources))
    return lines


def _below(words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT + "  ")


def _decisions(explanation: Explanation) -> list[str]:
    lines = ["Decisions (+ taken, - not taken; predicted times without and with)"]
    for record in explanation.passes:
        if record.notes:
            taken = sum(note.taken for note in record.notes)
            lines.append(f"{record.name}: {taken} taken, {len(record.notes) - taken} not")
            lines += _notes(record.notes)
    return lines


def _notes(notes: Iterable[Note]) -> Iterator[str]:
    """What is predicted to gain or lose, each by itself; else what is said of several nodes once for all of them."""

    def key(note: Note) -> tuple[bool, bool, str]:
        return note.gain_us is None, not note.taken, note.message if note.gain_us is None else ""

    for (_, rejected, _), group in groupby(sorted(notes, key=key), key):
        members = list(group)
        sign = "-" if rejected else "+"
        if members[0].gain_us is not None:
            yield from (line for note in members for line in _timed(sign, note))
            continue
        count = f"{len(members)} × " if len(members) > 1 else ""
        where = ", ".join(nodes_text(note) for note in members)
        yield from textwrap.wrap(f"  {sign} {count}{members[0].message}", WIDTH, subsequent_indent=_INDENT)
        yield _INDENT + textwrap.shorten(where, WIDTH - len(_INDENT), placeholder=" …")
        if rejected:
            sources = list(dict.fromkeys(note.source for note in members if note.source))
            yield from _below(short_sources(sources))


def _timed(sign: str, note: Note) -> list[str]:
    times = f"{note.before_us:9.1f} → {note.after_us:8.1f} µs"
    words = f"  {sign} {times}  {note.message}: {nodes_text(note)}"
    return textwrap.wrap(words, WIDTH, subsequent_indent=" " * 30)


def nodes_text(note: Note) -> str:
    """The nodes of a note: the first and the last of several."""
    return note.nodes[0] if len(note.nodes) == 1 else f"{note.nodes[0]} … {note.nodes[-1]} ({len(note.nodes)})"
