"""What the references' pages share."""

from __future__ import annotations

import re
from inspect import cleandoc

GENERATED = "<!-- Written by `make docs` out of the program: change the program, not this. -->"

_CODE_SPAN = re.compile(r"(`+[^`]+`+)")
# Emphasis, tags, links [text](place) or [text][place], and what a line [name]: would define.
_MARKUP = re.compile(
    r"(\*|<(?=[A-Za-z/!])|\](?=[(\[])|^\[(?=[^\]\n]*\]:)|(?<!\w)_|_(?!\w))", re.MULTILINE
)
_LAID_OUT = re.compile(r"^( |.* {3,})")


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return escaped(" ".join(text.split())).replace("|", "\\|")


def code_cell(text: str) -> str:
    """Code for a cell of a Markdown table, whose bars would end the cell even in a code span."""
    return f"`{' '.join(text.split())}`".replace("|", "\\|")


def escaped(text: str) -> str:
    """Text in which nothing but code spans is Markdown: no emphasis, no tags, no links."""
    parts = _CODE_SPAN.split(text)
    # Every second part is a code span.
    parts[::2] = [_MARKUP.sub(r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def prose(text: str) -> str:
    """Paragraphs as the program prints them: running text, or a block where columns are laid out.

    A list is laid out by its indentation, which Markdown would join to one line.
    """
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", cleandoc(text)):
        lines = paragraph.splitlines()
        if any(_LAID_OUT.match(line) for line in lines):
            parts.append(block("\n".join(lines)))
        else:
            parts.append(escaped("\n".join(lines)))
    return "\n\n".join(parts)


def block(text: str, language: str = "") -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"
