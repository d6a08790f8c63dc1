"""An explanation as a page: one file with its own style and script, which needs no network."""

from __future__ import annotations

from typing import Final

import jinja2

from sepc.report.dot import bytes_text, short_op
from sepc.report.explanation import WHO, Explanation
from sepc.report.explanation_text import flops_text, nodes_text, percent, short_sources

TEMPLATE: Final = "explanation.html.jinja"


def page(explanation: Explanation) -> str:
    """The page as text, in HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sepc", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=bytes_text, flops=flops_text, nodes=nodes_text, operator=short_op, sources=short_sources
    )
    return environment.get_template(TEMPLATE).render(explanation=explanation, who=WHO, percent=percent)
