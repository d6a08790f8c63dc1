"""``sepc``: look after what sepc keeps on this machine.

sepc cache status
sepc cache verify
sepc cache clear
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from sepc.cli import Parser
from sepc.errors import SepcError

CACHE: Final[Mapping[str, str]] = {
    "status": "say where the compiled models are, how many, and how large",
    "verify": "check every compiled model, and name those that are damaged",
    "clear": "delete all compiled models",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 1 after an error, and where `verify` finds something."""
    options = parser().parse_args(arguments)
    try:
        from sepc.cli import cache  # Late, as above all PyTorch takes seconds.

        run: Callable[[], int] = getattr(cache, options.action)
        return run()
    except SepcError as error:
        print(f"sepc: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="sepc", description=(__doc__ or "").partition("\n")[0].partition(": ")[2])
    of_cache = made.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "cache", help="the cache of compiled models", description="The cache of compiled models."
    )
    actions = of_cache.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, text in CACHE.items():
        actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
    return made


if __name__ == "__main__":
    sys.exit(main())
