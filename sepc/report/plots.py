"""Pictures of costs: made by matplotlib, which is optional, as files, or as SVG to stand within a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from xml.etree import ElementTree

from sepc.errors import InputError, SepcError, require_known
from sepc.report import cost_plots

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sepc.report.explanation import Explanation

PlotKind = Literal["efficiency-gap", "waterline", "memory"]
KINDS: Final[Mapping[PlotKind, Callable[[Axes, Explanation], None]]] = {
    "efficiency-gap": cost_plots.draw_efficiency_gap,
    "waterline": cost_plots.draw_waterline,
    "memory": cost_plots.draw_memory,
}
FORMATS: Final = ("svg", "png", "pdf")
SIZE_INCHES: Final = (8.0, 4.6)
_INK: Final = "#010203"
"""Stands for the colour of text, which a page decides."""


class MatplotlibMissingError(SepcError):
    """matplotlib cannot be imported."""


def plot(explanation: Explanation, path: Path, kind: PlotKind) -> Path:
    """Write a picture of that kind; see `Explanation.plot`."""
    require_known(kind, KINDS, "picture", where="kind")
    return save(lambda figure: KINDS[kind](figure.subplots(), explanation), path)


def save(draw: Callable[[Figure], None], path: Path, size_inches: tuple[float, float] = SIZE_INCHES) -> Path:
    """Write what `draw` draws in a figure; the suffix of `path` is the format."""
    picture_format = path.suffix.removeprefix(".")
    if picture_format not in FORMATS:
        raise InputError(
            f"There is no format '{picture_format}'", where=str(path), fix=f"use one of {', '.join(FORMATS)}"
        )
    with _figure(size_inches) as figure:
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata=_metadata(picture_format), facecolor="white")
    return path


def inline_svg(explanation: Explanation, kind: PlotKind) -> str:
    """A picture as an element of HTML, transparent, with text in the colour of the page."""
    buffer = io.StringIO()
    with _figure(SIZE_INCHES, ink=_INK) as figure:
        KINDS[kind](figure.subplots(), explanation)
        figure.savefig(buffer, format="svg", metadata=_metadata("svg"), transparent=True)
    return _for_page(buffer.getvalue(), kind).replace(_INK, "currentColor")


def _metadata(picture_format: str) -> dict[str, Any]:
    """Without the time at which it is drawn, so that equal pictures are equal files."""
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(picture_format, {})


@contextmanager
def _figure(size_inches: tuple[float, float], ink: str = "black") -> Iterator[Figure]:
    """A figure apart from pyplot's, whose settings are the caller's; raises MatplotlibMissingError."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissingError(
            "Pictures of costs need matplotlib", why=str(error), fix="pip install matplotlib"
        ) from error
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: Any = {
        **dict.fromkeys(colours, ink),
        "svg.fonttype": "none",
        "svg.hashsalt": "sepc",
        "legend.framealpha": 0.0,
        "font.family": "sans-serif",
        "hatch.linewidth": 0.5,
    }
    with mpl.rc_context(settings):
        yield Figure(figsize=size_inches, layout="constrained")


def _for_page(svg: str, prefix: str) -> str:
    """An SVG file as an element of HTML: without namespaces and metadata, with only those names that are referred to.

    The names get a prefix, as there may be several pictures in a page.
    """
    root = ElementTree.fromstring(svg)
    referred = set(re.findall(r"#([\w-]+)", svg))
    for element in list(root.iter()):
        for child in [one for one in element if one.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            short = name.rpartition("}")[2]
            if short == "id" and value not in referred:
                continue
            own = f"{prefix}-{value}" if short == "id" else re.sub(r"#(?=[a-z]\w{10})", f"#{prefix}-", value)
            element.set(short, own)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("class", "plot")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
