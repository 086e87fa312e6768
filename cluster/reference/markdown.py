"""Pieces of Markdown that the pages are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from textwrap import dedent

GENERATED = (
    "<!-- Made by `make docs` (python -m cluster.reference). Change the code, not this file. -->"
)


# `_` within a word and `[` without a link behind it mean nothing to GitHub.
_MARKUP = re.compile(r"[*~]|<(?=[\w/!])|(?<!\w)_|_(?!\w)|\](?=\()")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; a cell's own bars and line breaks do not break it."""
    return [
        _row(head),
        "|" + "---|" * len(head),
        *(_row([_cell(text) for text in cells]) for cells in rows),
    ]


def code(text: str) -> str:
    """Text as code within a line, also where it holds backticks itself."""
    if "`" not in text:
        return f"`{text}`"
    longest = max(len(run) for run in re.findall(r"`+", text))
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}"


def block(text: str, language: str = "") -> list[str]:
    """The lines of a block of code."""
    return [f"```{language}", *text.strip("\n").splitlines(), "```"]


def prose(text: str) -> str:
    """A help text or docstring as Markdown, in which only its code is markup.

    Outside of backticks `<`, `*` and others would be taken for HTML, emphasis and links.
    """
    parts = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.S)
    return "".join(
        code(part.strip("`")) if number % 2 else _MARKUP.sub(r"\\\g<0>", part)
        for number, part in enumerate(parts)
    )


def paragraphs(text: str) -> Iterator[str]:
    """A help text or docstring of several lines; what is indented is shown as it stands."""
    for aside, lines in groupby(text.splitlines(), key=lambda line: line.startswith(" ")):
        if aside:
            yield from ["", *block(dedent("\n".join(lines))), ""]
        else:
            yield from prose("\n".join(lines)).splitlines()


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading's place in the page."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.strip().replace(" ", "-")


def link(text: str, heading: str) -> str:
    """A link to a heading of the same page."""
    return f"[{text}](#{anchor(heading)})"


def page(lines: Iterable[str]) -> str:
    """The text of a file: the note that it is generated, and a newline at its end."""
    text = "\n".join([GENERATED, "", *lines]).rstrip() + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
