"""PyTorch without what it logs and prints of failures, where errors of ours say what the user needs of it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep these loggers silent in the block; what is printed on standard error only counts if it does not fail."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, loggers)]
    for logger, _ in levels:
        logger.setLevel(logging.CRITICAL + 1)
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, level in levels:
            logger.setLevel(level)
