"""Runs blocks of Python one after the other, as one program would; what each prints becomes JSON.

python tests/docs/run_blocks.py < blocks.json

Reads a list of [name of the page, line, text], and writes a list of texts to standard output, where nothing else goes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any


def main() -> None:
    """Run what standard input has."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for page, line, text in json.load(sys.stdin):
        # Lines are numbered as on the page, so that a traceback, and an error of sepc, names the page's own line.
        code = compile("\n" * line + text, page, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, namespace)
        printed.append(output.getvalue())
    json.dump(printed, sys.stdout)


if __name__ == "__main__":
    main()
