"""The programs that come with sepc; each is a module with a `main`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from sepc.errors import did_you_mean

MODEL_FORMS = "a .pt2 file, timm:NAME, torchvision:NAME or path/file.py:FUNCTION"
"""What names a model on the command line."""


class Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for an option that it does not know."""

    def error(self, message: str) -> NoReturn:
        """Print `message`, and leave with status 2."""
        start = "unrecognized arguments: "
        if message.startswith(start):
            option = message.removeprefix(start).split()[0].partition("=")[0]
            known = self._option_string_actions
            message += "; " + (did_you_mean(option, known) or f"known are {', '.join(known)}")
        super().error(message)
