"""Pages of Markdown as tests see them: blocks of Python with what they print, and commands.

What follows the language of a block says how it is tested:

- ``python``: it runs, behind those before it on the page; ``python slow`` makes its page a slow test;
- ``python excerpt``, ``sh excerpt``: it is a part of something that cannot run here; Python only has to be Python;
- ``text output``: what the block before it prints; ``…`` stands for anything.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT: Final = Path(__file__).parents[2]
README: Final = ROOT / "README.md"
PAGES: Final = sorted((ROOT / "docs").glob("*.md"))
# Inline code that begins so is a command as well.
_COMMAND: Final = re.compile(r"(?:sepc-\w+|sepc cache|python (?:-m|examples)|make|pip install) ?\S")
_PLACEHOLDERS: Final = ("…", "...")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words behind that, its text, and the line that it begins in."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int


@dataclass(frozen=True)
class Program:
    """The Python blocks of a page that run, in order, each with what it prints, where the page says that."""

    page: Path
    steps: tuple[tuple[Block, str | None], ...]

    @property
    def is_slow(self) -> bool:
        """Whether any of it is."""
        return any("slow" in block.words for block, _ in self.steps)


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found = []
    for token in _tokens(page):
        if token.type == "fence":
            language, *words = token.info.split() or [""]
            found.append(Block(language, tuple(words), token.content, _line(token)))
    return found


def program(page: Path) -> Program:
    """What of a page runs."""
    every = blocks(page)
    outputs = {before.line: after.text for before, after in pairwise(every) if (after.language, after.words) == OUTPUT}
    runs = [one for one in every if one.language == "python" and "excerpt" not in one.words]
    return Program(page, tuple((one, outputs.get(one.line)) for one in runs))


OUTPUT: Final = ("text", ("output",))


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Every command line of a page, split as a shell does, and the line that its text begins in."""
    for token in _tokens(page):
        if token.type == "code_block" or (token.type == "fence" and (token.info or "sh") == "sh"):
            lines = token.content.replace("\\\n", " ").splitlines()
            texts = [line for line in lines if token.type == "fence" or _COMMAND.match(line)]
        else:
            texts = [
                one.content for one in token.children or () if one.type == "code_inline" and _COMMAND.match(one.content)
            ]
        for text in texts:
            for words in _simple_commands(text.replace("\n", " ")):
                yield _line(token), words


def _simple_commands(text: str) -> Iterator[list[str]]:
    """The commands of one line, without the variables in front of them."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in (*lexer, "&&"):
        if set(word) <= set("|&;>"):
            while words and re.match(r"\w+=", words[0]) and words[1:]:
                del words[0]
            if words:
                yield words
            words = []
        elif word not in _PLACEHOLDERS:
            words.append(word)


def _tokens(page: Path) -> Sequence[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def _line(token: Token) -> int:
    return token.map[0] + 1 if token.map else 0
